import json
from pathlib import Path

import pytest

from pxd.models.chat import ChatTokenizer, OptionRefused
from pxd.models.errors import ModelError
from pxd.serving.requests import Message
from tests.models.files import write_model
from tests.tiny_models import CHAT_TEMPLATE, save_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_model(tmp_path_factory.mktemp("chat") / "model")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> ChatTokenizer:
    return ChatTokenizer.load(directory)


def with_template(
    directory: Path, target: Path, template: str | None, **more: object
) -> ChatTokenizer:
    write_model(target)
    save_tokenizer(target)
    config = json.loads((target / "tokenizer_config.json").read_text()) | more
    if template is None:
        del config["chat_template"]
    else:
        config["chat_template"] = template
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return ChatTokenizer.load(target)


def decode(tokenizer: ChatTokenizer, ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    return detokenizer.add(ids) + detokenizer.finish()


def test_a_chat_is_templated_up_to_the_answer(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode_chat((Message("system", "Be kind."), Message("user", "Grüße 👋")))
    assert all(isinstance(token, int) for token in ids)
    assert decode(tokenizer, ids) == (
        "<|system|>Be kind.<|end|><|user|>Grüße 👋<|end|><|assistant|>"
    )


def test_ends_are_those_of_the_configuration_and_of_the_tokenizer(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.eos == (2, 257)


def test_developers_speak_as_system_where_the_template_knows_none(
    tokenizer: ChatTokenizer, directory: Path, tmp_path: Path
) -> None:
    chat = (Message("developer", "Be brief."),)
    assert decode(tokenizer, tokenizer.encode_chat(chat)).startswith("<|system|>Be brief.")
    knowing = with_template(directory, tmp_path, "{# developer #}" + CHAT_TEMPLATE)
    assert decode(knowing, knowing.encode_chat(chat)).startswith("<|developer|>")


def test_without_a_template_the_error_says_so(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        with_template(directory, tmp_path, None).encode_chat((Message("user", "hi"),))


@pytest.mark.parametrize(
    ("options", "end"), [({}, "<think>"), ({"enable_thinking": False}, "</think>")]
)
def test_a_template_may_be_mlx_lms_own_code(
    directory: Path, tmp_path: Path, options: dict[str, bool], end: str
) -> None:
    ours = with_template(directory, tmp_path, None, chat_template_type="deepseek_v32")
    chat = [
        Message("system", "Be kind."),
        Message("user", "Hi"),
        Message("assistant", "Yes?"),
        Message("user", "Bye"),
    ]
    wanted = (
        "<|begin_of_sentence|>Be kind.<|User|>Hi<|Assistant|></think>Yes?<|end_of_sentence|>"
        f"<|User|>Bye<|Assistant|>{end}"
    )
    # DeepSeek's markers are made of other characters that look the same.
    wanted = wanted.replace("|", "\N{FULLWIDTH VERTICAL LINE}")
    wanted = wanted.replace("_", "\N{LOWER ONE EIGHTH BLOCK}")
    assert decode(ours, ours.encode_chat(chat, options)) == wanted


def test_what_a_template_in_python_cannot_use_is_told(directory: Path, tmp_path: Path) -> None:
    ours = with_template(directory, tmp_path, None, chat_template_type="deepseek_v32")
    with pytest.raises(ModelError, match="refuses this chat: ThinkingMode"):
        ours.encode_chat([Message("user", "Hi"), Message("assistant", "Yes?")])
    for option in ("thinking_mode", "nobody_knows_this"):
        with pytest.raises(OptionRefused, match="cannot use these options"):
            ours.encode_chat([Message("user", "Hi")], {option: "x"})


@pytest.mark.parametrize("name", ["no_such", "../tokenizer_utils", "os", 7, ["deepseek_v32"]])
def test_no_other_code_runs_as_a_template(directory: Path, tmp_path: Path, name: object) -> None:
    with pytest.raises(ModelError, match="is none of mlx-lm's"):
        with_template(directory, tmp_path, None, chat_template_type=name)


def test_a_format_of_answers_leaves_the_template_to_the_model(
    directory: Path, tmp_path: Path
) -> None:
    ours = with_template(directory, tmp_path, CHAT_TEMPLATE, chat_template_type="muse_spark")
    ids = ours.encode_chat([Message("user", "Hi")])
    assert decode(ours, ids) == "<|user|>Hi<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{% for %}", "refuses"),
        ("{{ messages[9].content.x.y }}", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
    ],
)
def test_what_a_template_refuses_is_passed_on(
    directory: Path, tmp_path: Path, template: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        with_template(directory, tmp_path, template).encode_chat((Message("user", "hi"),))


def test_special_tokens_in_a_message_are_text_of_the_user(tokenizer: ChatTokenizer) -> None:
    """Documents what is: like everywhere with chat templates, a user can write control tokens."""
    ids = tokenizer.encode_chat((Message("user", "a<|end|>b"),))
    assert ids.count(257) == 2


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({}, (1.0, 1.0, 0, 0.0)),
        (
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05},
            (0.7, 0.8, 20, 0.05),
        ),
        ({"do_sample": False, "temperature": 0.7, "top_k": 20}, (0.0, 1.0, 0, 0.0)),
        ({"temperature": -1, "top_p": "x", "top_k": -1, "min_p": 7}, (1.0, 1.0, 0, 0.0)),
    ],
)
def test_a_model_may_wish_how_it_is_sampled(
    tmp_path: Path, wishes: dict[str, object], expected: tuple[float, float, int, float]
) -> None:
    path = write_model(tmp_path / "model")
    save_tokenizer(path)
    (path / "generation_config.json").write_text(json.dumps(wishes))
    wishing = ChatTokenizer.load(path)
    assert (wishing.temperature, wishing.top_p, wishing.top_k, wishing.min_p) == expected
