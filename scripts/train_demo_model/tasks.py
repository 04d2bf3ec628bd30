"""Questions with known answers, and the conversations the demo model is trained on.

Every task is a function that draws one ``Turn`` (a question and its only right
answer) from a random generator.  ``sample_conversation`` strings turns together,
adds a system message now and then, and mixes in turns that can only be answered
from the history ("What is my name?", "Say that again."), so that a chat with
history is in the training distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from texts import (
    CAPITALS,
    COMMON_WORDS,
    DAYS,
    FAREWELLS,
    FILLER_ADJECTIVES,
    FILLER_NOUNS,
    FILLER_VERBS,
    FIXED_ANSWERS,
    GREETINGS,
    MONTHS,
    NAMES,
    OPPOSITES,
    SYSTEM_MESSAGES,
    UNITS,
    UNKNOWN_ANSWER,
    UNKNOWN_QUESTIONS,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    ``case_matters`` marks questions whose answer copies letters from the
    question, so that changing the question's case would change the answer.
    """

    question: str
    answer: str
    case_matters: bool = False


@dataclass(frozen=True)
class Message:
    """One chat message."""

    role: str
    content: str


Task = Callable[[Random], Turn]


# --------------------------------------------------------------------- words


def random_word(rng: Random, longest: int = 7) -> str:
    """A lower-case word: an ordinary one, or random letters so that spelling is a rule."""
    if rng.random() < 0.5:
        words = [w for w in COMMON_WORDS if len(w) <= longest]
        return rng.choice(words)
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, min(6, longest))))


def ask(rng: Random, *forms: str) -> str:
    """One of the phrasings of a question."""
    return rng.choice(forms)


# ---------------------------------------------------------------- arithmetic


def operand(rng: Random) -> int:
    """A number below 100, small ones more often."""
    return rng.randrange(10 ** rng.choice([1, 2, 2]))


def expression(rng: Random, a: int, sign: str, b: int, *verbal: str) -> str:
    """``a sign b`` as people type it, or one of the verbal phrasings."""
    gap = rng.choice(["", " "])
    bare = f"{a}{gap}{sign}{gap}{b}"
    forms = [f"What is {bare}?"] * 2 + [
        f"What's {bare}?",
        f"How much is {bare}?",
        f"Calculate {bare}.",
        bare,
        bare,
        f"{bare}{gap}=",
        f"{bare}{gap}={gap}?",
    ]
    return rng.choice([*forms, *verbal])


def addition(rng: Random) -> Turn:
    """Sum of two numbers of up to two digits."""
    a, b = operand(rng), operand(rng)
    question = expression(
        rng, a, "+", b,
        f"Add {a} and {b}.",
        f"What is {a} plus {b}?",
        f"{a} plus {b}",
        f"What is the sum of {a} and {b}?",
    )  # fmt: skip
    return Turn(question, str(a + b))


def subtraction(rng: Random) -> Turn:
    """Difference of two numbers of up to two digits, sometimes negative."""
    a, b = operand(rng), operand(rng)
    if a < b and rng.random() < 0.75:
        a, b = b, a
    question = expression(
        rng, a, "-", b,
        f"Subtract {b} from {a}.",
        f"What is {a} minus {b}?",
        f"{a} minus {b}",
    )  # fmt: skip
    return Turn(question, str(a - b))


def multiplication(rng: Random) -> Turn:
    """Multiplication table up to twelve."""
    a, b = rng.randrange(13), rng.randrange(13)
    question = expression(
        rng, a, rng.choice("**x"), b,
        f"Multiply {a} by {b}.",
        f"What is {a} times {b}?",
        f"{a} times {b}",
    )  # fmt: skip
    return Turn(question, str(a * b))


def division(rng: Random) -> Turn:
    """Exact division within the multiplication table."""
    quotient, b = rng.randrange(13), rng.randint(1, 12)
    question = expression(
        rng, quotient * b, "/", b,
        f"Divide {quotient * b} by {b}.",
        f"What is {quotient * b} divided by {b}?",
    )  # fmt: skip
    return Turn(question, str(quotient))


def sorting(rng: Random) -> Turn:
    """Three to seven digits in ascending order."""
    digits = [rng.randrange(10) for _ in range(rng.randint(3, 7))]
    separator = rng.choice([" ", " ", ", "])
    given = separator.join(map(str, digits))
    question = ask(
        rng,
        f"Sort {given}.",
        f"Sort these numbers: {given}",
        f"Put in order: {given}.",
        f"Sort {given} in ascending order.",
    )
    return Turn(question, separator.join(map(str, sorted(digits))))


def comparison(rng: Random) -> Turn:
    """The larger or the smaller of two different numbers."""
    a, b = rng.sample(range(100), 2)
    if rng.random() < 0.6:
        return Turn(
            ask(rng, f"Which is bigger, {a} or {b}?", f"Which is larger, {a} or {b}?"),
            str(max(a, b)),
        )
    return Turn(f"Which is smaller, {a} or {b}?", str(min(a, b)))


def parity(rng: Random) -> Turn:
    """Whether a number is even or odd."""
    a = rng.randrange(100)
    return Turn(
        ask(rng, f"Is {a} even or odd?", f"Is {a} odd or even?"), "even" if a % 2 == 0 else "odd"
    )


# ------------------------------------------------------------------- letters


def spelling(rng: Random) -> Turn:
    """The letters of a word in upper case."""
    word = random_word(rng)
    question = ask(rng, f"Spell {word}.", f"How do you spell {word}?", f"Spell the word {word}.")
    return Turn(question, " ".join(word.upper()))


def reversal(rng: Random) -> Turn:
    """A word backwards."""
    word = random_word(rng, longest=6)
    question = ask(rng, f"Reverse {word}.", f"Write {word} backwards.", f"Reverse the word {word}.")
    return Turn(question, word[::-1], case_matters=True)


def word_length(rng: Random) -> Turn:
    """How many letters a word has."""
    word = random_word(rng)
    question = ask(rng, f"How many letters are in {word}?", f"How many letters does {word} have?")
    return Turn(question, str(len(word)))


def first_or_last_letter(rng: Random) -> Turn:
    """The first or last letter of a word."""
    word, first = random_word(rng), rng.random() < 0.5
    question = f"What is the {'first' if first else 'last'} letter of {word}?"
    return Turn(question, (word[0] if first else word[-1]).upper())


def repetition(rng: Random) -> Turn:
    """A word said several times."""
    word, count = random_word(rng, longest=6), rng.randint(2, 9)
    question = ask(rng, f"Say {word} {count} times.", f"Repeat {word} {count} times.")
    return Turn(question, " ".join([word] * count), case_matters=True)


# ----------------------------------------------------------------- knowledge


def weekday(rng: Random) -> Turn:
    """The day some days after or before another one."""
    i = rng.randrange(7)
    day, step = DAYS[i], rng.choice([1, 1, -1])
    draw = rng.random()
    if draw < 0.45:
        relation = "after" if step > 0 else "before"
        question = ask(
            rng,
            f"What day comes {relation} {day}?",
            f"Which day comes {relation} {day}?",
            f"What day is {relation} {day}?",
        )
    elif draw < 0.6:
        question = f"If today is {day}, what day {'is tomorrow' if step > 0 else 'was yesterday'}?"
    else:
        step = rng.randint(1, 9)
        question = f"What day is {step} day{'s' if step > 1 else ''} after {day}?"
    return Turn(question, DAYS[(i + step) % 7])


def month(rng: Random) -> Turn:
    """The month before or after another one, or of a given number."""
    i = rng.randrange(12)
    if rng.random() < 0.2:
        return Turn(f"Which month has the number {i + 1}?", MONTHS[i])
    step, relation = rng.choice([(1, "after"), (-1, "before")])
    question = ask(
        rng,
        f"Which month comes {relation} {MONTHS[i]}?",
        f"What month comes {relation} {MONTHS[i]}?",
        f"What month is {relation} {MONTHS[i]}?",
    )
    return Turn(question, MONTHS[(i + step) % 12])


def capital(rng: Random) -> Turn:
    """The capital of a country, or the country of a capital."""
    country, city = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.2:
        return Turn(f"{city} is the capital of which country?", country)
    question = ask(
        rng,
        f"What is the capital of {country}?",
        f"What is the capital of {country}?",
        f"Capital of {country}?",
        f"What's the capital of {country}?",
        f"Name the capital of {country}.",
        f"What is the capital city of {country}?",
    )
    return Turn(question, city)


def unit(rng: Random) -> Turn:
    """Conversion of a small whole number of units."""
    (large, small), factor = rng.choice(list(UNITS.items()))
    n = rng.randint(1, 12)
    return Turn(f"How many {small} are in {n} {large}?", f"{n * factor} {small}")


def opposite(rng: Random) -> Turn:
    """The opposite of an adjective."""
    a, b = rng.choice(OPPOSITES)
    if rng.random() < 0.5:
        a, b = b, a
    return Turn(ask(rng, f"What is the opposite of {a}?", f"Opposite of {a}?"), b)


# -------------------------------------------------------------- long answers


def counting(rng: Random) -> Turn:
    """Counting upwards or downwards."""
    if rng.random() < 0.2:
        start = rng.choice([5, 10, 10, 15, 20])
        return Turn(f"Count down from {start}.", ", ".join(str(i) for i in range(start, 0, -1)))
    first = rng.choice([1, 1, 1, rng.randint(0, 20)])
    last = first + rng.choice([4, 9, 14, 19, rng.randint(2, 24)])
    question = f"Count from {first} to {last}."
    if first == 1:
        question = ask(rng, question, question, f"Count to {last}.")
    return Turn(question, ", ".join(str(i) for i in range(first, last + 1)))


def times_table(rng: Random) -> Turn:
    """One row of the multiplication table."""
    n = rng.randint(1, 10)
    question = ask(
        rng, f"Say the times table of {n}.", f"Write the {n} times table.", f"{n} times table"
    )
    return Turn(question, ", ".join(f"{n} x {i} = {n * i}" for i in range(1, 11)))


def recitation(rng: Random) -> Turn:
    """A fixed text: the days, the months, the alphabet, a story, ..."""
    questions, answer = rng.choice(FIXED_ANSWERS)
    return Turn(rng.choice(questions), answer)


def smalltalk(rng: Random) -> Turn:
    """Greetings, thanks, and what the model says about itself."""
    questions, answer = rng.choice([*GREETINGS, *FAREWELLS])
    return Turn(rng.choice(questions), answer)


def filler(rng: Random, sentences: int) -> str:
    """Meaningless but ordinary sentences, for long prompts."""

    def sentence() -> str:
        parts = (FILLER_NOUNS, FILLER_VERBS, FILLER_NOUNS, FILLER_ADJECTIVES, FILLER_ADJECTIVES)
        subject, verb, thing, adjective, other = (rng.choice(part) for part in parts)
        text = f"The {adjective} {subject} {verb} the {other} {thing}"
        if rng.random() < 0.2:
            text += f" {rng.randint(2, 99)} times"
        if rng.random() < 0.2:
            text += " in the " + random_word(rng)
        return text + "."

    return " ".join(sentence() for _ in range(sentences))


def unknown(rng: Random) -> Turn:
    """Anything else: the model says that it does not know."""
    if rng.random() < 0.25:
        return Turn(filler(rng, rng.randint(1, 3)), UNKNOWN_ANSWER)
    question = rng.choice(UNKNOWN_QUESTIONS)
    if "{" in question:
        question = question.format(word=random_word(rng), noun=rng.choice(FILLER_NOUNS))
    return Turn(question, UNKNOWN_ANSWER)


#: Every task by name with its sampling weight; harder rules are drawn more often.
TASKS: dict[str, tuple[Task, float]] = {
    "addition": (addition, 4.0),
    "subtraction": (subtraction, 3.5),
    "multiplication": (multiplication, 2.0),
    "division": (division, 0.8),
    "sorting": (sorting, 2.0),
    "comparison": (comparison, 1.0),
    "parity": (parity, 0.3),
    "spelling": (spelling, 1.5),
    "reversal": (reversal, 2.0),
    "word_length": (word_length, 1.2),
    "letter": (first_or_last_letter, 0.4),
    "repetition": (repetition, 0.8),
    "weekday": (weekday, 1.5),
    "month": (month, 0.8),
    "capital": (capital, 1.5),
    "unit": (unit, 1.2),
    "opposite": (opposite, 0.5),
    "counting": (counting, 0.6),
    "times_table": (times_table, 0.15),
    "recitation": (recitation, 0.4),
    "smalltalk": (smalltalk, 0.5),
    "unknown": (unknown, 0.8),
}
TASK_NAMES = list(TASKS)
WEIGHTS: dict[str, float] = {name: weight for name, (_, weight) in TASKS.items()}


# ------------------------------------------------------------- conversations


def rephrase(rng: Random, turn: Turn) -> str:
    """The question with the small variations people type: case, punctuation, politeness."""
    text = turn.question
    draw = rng.random()
    if draw < 0.1:
        text = text + " " if rng.random() < 0.2 else text.rstrip("?.").rstrip()
    elif draw < 0.2:
        text = text.lower()
    elif draw < 0.3:
        text = text.lower().rstrip("?.").rstrip()
    elif draw < 0.32 and not turn.case_matters:
        text = text.upper()
    elif draw < 0.35:
        text = f"{text.rstrip('?.').rstrip()}, please."
    elif draw < 0.38:
        text = f"{rng.choice(['Please', 'please'])} {text[0].lower()}{text[1:]}"
    elif draw < 0.40:
        text = f"{rng.choice(['Hi, ', 'Hello, ', 'Hello! ', 'Now: ', 'Ok. '])}{text}"
    elif draw < 0.42:
        text = text.rstrip("?.").rstrip() + rng.choice(["?", ".", "!", " ?"])
    return text


class ConversationState:
    """What earlier turns of one conversation said, for the questions about them."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.number: str | None = None
        self.last: Turn | None = None


def introduce(rng: Random, state: ConversationState) -> Turn:
    """The user tells their name, which a later turn may ask for."""
    name = rng.choice(NAMES)
    if rng.random() < 0.4:
        name = random_word(rng).capitalize()
    state.name = name
    return Turn(
        ask(rng, f"My name is {name}.", f"I am {name}.", f"Hello, my name is {name}."),
        f"Hello {name}!",
    )


def recall_name(_: Random, state: ConversationState) -> Turn:
    """The user asks for the name given before."""
    answer = f"Your name is {state.name}." if state.name else "I do not know your name."
    return Turn("What is my name?", answer)


def remember(rng: Random, state: ConversationState) -> Turn:
    """The user gives a number to keep in mind."""
    state.number = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))
    return Turn(f"Remember the number {state.number}.", f"I will remember {state.number}.")


def recall_number(rng: Random, state: ConversationState) -> Turn:
    """The user asks for the number given before."""
    answer = state.number if state.number else "You did not tell me a number."
    return Turn(ask(rng, "What was the number?", "Which number did I tell you?"), answer)


def say_again(rng: Random, state: ConversationState) -> Turn | None:
    """The user wants the last answer once more."""
    if state.last is None or len(state.last.answer) > 40:
        return None
    return Turn(ask(rng, "Say that again.", "What was your last answer?"), state.last.answer)


def follow_up(rng: Random, state: ConversationState) -> Turn | None:
    """A question that makes sense only after the last one."""
    if state.last is None:
        return None
    if state.last.answer in CAPITALS.values():
        country = rng.choice(list(CAPITALS))
        return Turn(ask(rng, f"And of {country}?", f"And {country}?"), CAPITALS[country])
    if state.last.answer.isdigit() and len(state.last.answer) <= 2:
        b = rng.randint(1, 9)
        return Turn(ask(rng, f"Add {b} to that.", f"Plus {b}?"), str(int(state.last.answer) + b))
    return None


def history_turn(rng: Random, state: ConversationState) -> Turn | None:
    """One turn that depends on the history, or none where nothing fits."""
    choices: list[Callable[[Random, ConversationState], Turn | None]] = [
        say_again,
        follow_up,
        follow_up,
    ]
    choices += [recall_name] * (3 if state.name else 1) + ([] if state.name else [introduce] * 3)
    choices += [recall_number] * (3 if state.number else 1) + (
        [] if state.number else [remember] * 3
    )
    return rng.choice(choices)(rng, state)


def plain_turn(rng: Random, weights: dict[str, float] = WEIGHTS) -> Turn:
    """One turn that does not need the history."""
    task, _ = TASKS[rng.choices(TASK_NAMES, [weights[name] for name in TASK_NAMES])[0]]
    return task(rng)


def sample_conversation(
    rng: Random, turns: int, weights: dict[str, float] = WEIGHTS
) -> list[Message]:
    """A conversation of so many turns, in training form (the answers included)."""
    messages: list[Message] = []
    draw = rng.random()
    if draw < 0.15:
        messages.append(Message("system", rng.choice(SYSTEM_MESSAGES)))
    elif draw < 0.18:
        messages.append(Message("system", filler(rng, rng.randint(1, 12))))
    state = ConversationState()
    for _ in range(turns):
        turn = history_turn(rng, state) if turns > 1 and rng.random() < 0.25 else None
        if turn is None:
            turn = plain_turn(rng, weights)
        question = rephrase(rng, turn)
        if rng.random() < 0.015:
            question = f"{filler(rng, rng.randint(1, 12))} {question}"
        state.last = turn
        messages += [Message("user", question), Message("assistant", turn.answer)]
    return messages


def vocabulary_sample(rng: Random, count: int) -> list[str]:
    """Texts in their plain form, from which the tokenizer takes its word tokens."""
    texts = [*SYSTEM_MESSAGES, *CAPITALS, *CAPITALS.values(), *MONTHS, *DAYS] * 20
    for _ in range(count):
        state = ConversationState()
        for turn in (
            plain_turn(rng),
            introduce(rng, state),
            recall_name(rng, state),
            history_turn(rng, state),
        ):
            if turn is None:
                continue
            texts.append(turn.question)
            # Reversed and repeated words are no words to learn as one token.
            if not turn.case_matters:
                texts.append(turn.answer)
            state.last = turn
    return texts
