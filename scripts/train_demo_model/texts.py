"""The fixed facts and phrases the tasks draw on."""

from __future__ import annotations

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]  # fmt: skip
SEASONS = ["Spring", "Summer", "Autumn", "Winter"]
PLANETS = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]
COLOURS = ["red", "orange", "yellow", "green", "blue", "indigo", "violet"]

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Spain": "Madrid", "Italy": "Rome",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Egypt": "Cairo",
    "Kenya": "Nairobi", "Brazil": "Brasilia", "Canada": "Ottawa", "Mexico": "Mexico City",
    "Peru": "Lima", "Chile": "Santiago", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Poland": "Warsaw", "Greece": "Athens",
    "Turkey": "Ankara", "Austria": "Vienna", "Hungary": "Budapest", "Portugal": "Lisbon",
    "Ireland": "Dublin", "Iceland": "Reykjavik", "Australia": "Canberra", "Cuba": "Havana",
    "Russia": "Moscow", "Ukraine": "Kyiv", "Belgium": "Brussels", "Switzerland": "Bern",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "Argentina": "Buenos Aires",
    "Colombia": "Bogota", "Romania": "Bucharest", "Bulgaria": "Sofia", "Croatia": "Zagreb",
    "Morocco": "Rabat", "England": "London", "South Korea": "Seoul",
    "New Zealand": "Wellington",
}  # fmt: skip

UNITS = {
    ("km", "m"): 1000, ("m", "cm"): 100, ("cm", "mm"): 10, ("kg", "g"): 1000,
    ("hours", "minutes"): 60, ("minutes", "seconds"): 60, ("days", "hours"): 24,
    ("weeks", "days"): 7, ("feet", "inches"): 12, ("years", "months"): 12,
}  # fmt: skip

OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("left", "right"), ("day", "night"),
    ("black", "white"), ("fast", "slow"), ("old", "young"), ("high", "low"), ("hard", "soft"),
    ("open", "closed"), ("good", "bad"), ("light", "dark"), ("early", "late"),
    ("long", "short"), ("rich", "poor"), ("wet", "dry"), ("full", "empty"), ("happy", "sad"),
    ("yes", "no"),
]  # fmt: skip

NAMES = [
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate",
    "Leo", "Maria", "Nina", "Oscar", "Paul", "Rosa", "Sam", "Tom", "Vera", "Alice", "Bob",
    "Carol", "Eve",
]  # fmt: skip
#: Words to spell, reverse and measure.  They get no token of their own: the model
#: must see their letters, as it does with words it was never trained on.
COMMON_WORDS = [
    "apple", "banana", "cherry", "lemon", "grape", "melon", "mountain", "forest", "ocean",
    "island", "desert", "valley", "castle", "bridge", "window", "kitchen", "table", "chair",
    "pencil", "paper", "rocket", "engine", "signal", "packet", "router", "server", "client",
    "python", "kernel", "tensor", "matrix", "vector", "silver", "golden", "purple", "butter",
    "cheese", "bread", "coffee", "sugar", "pepper", "hammer", "ladder", "mirror", "basket",
    "bottle", "candle", "doctor", "teacher", "farmer", "sailor", "writer", "singer", "dragon",
    "tiger", "monkey", "rabbit", "turtle", "spider", "cat", "dog", "fish", "bird", "horse",
    "mouse", "sheep", "cow", "tree", "flower", "grass", "stone", "water", "fire", "wind", "rain",
    "snow", "cloud", "moon", "star", "sun", "sky", "sea", "lake", "hill", "road", "city", "town",
    "home", "room", "door", "wall", "roof", "lamp", "clock", "book", "school", "friend", "mother",
    "father", "sister", "brother", "child", "baby", "man", "woman", "king", "queen", "hand",
    "foot", "head", "eye", "ear", "nose", "mouth", "heart", "milk", "egg", "meat", "rice", "salt",
    "soup", "cake", "apple", "pear", "plum", "ship", "boat", "train", "plane", "car", "bus",
    "bike", "hello", "world", "thanks", "please", "house", "green", "brown", "white", "black",
    "blue", "red", "yellow", "orange", "model", "network", "computer", "keyboard", "screen",
    "cable", "token", "layer", "laptop", "phone", "music", "movie", "game", "ball", "toy", "gold",
    "iron", "steel", "glass", "wood", "paint", "brush", "shirt", "shoe", "hat", "coat",
]  # fmt: skip
FILLER_ADJECTIVES = [
    "quiet", "tall", "narrow", "bright", "heavy", "gentle", "strange", "ancient", "modern",
    "broken",
]  # fmt: skip
FILLER_NOUNS = [
    "captain", "garden", "village", "machine", "merchant", "painter", "river", "tower", "wagon",
    "library",
]  # fmt: skip
FILLER_VERBS = [
    "watched", "crossed", "carried", "painted", "visited", "followed", "repaired", "measured",
    "found", "praised",
]  # fmt: skip
SYSTEM_MESSAGES = [
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are a friendly assistant. Answer in one sentence.",
    "Answer briefly.",
    "Be brief.",
    "You are a careful teacher. Think before you answer, and give only the answer.",
    "You are pxd, a network of computers that runs one model together.",
    "Answer the question as well as you can. If you do not know the answer, say so.",
    "You are a test assistant.",
    "Always answer in English.",
    "You are a concise and polite assistant who helps people with small questions.",
]

STORY = (
    "Once upon a time a little robot lived in a small house by the river. Every morning it "
    "counted the birds on the roof, and every evening it counted the stars. One night a new "
    "star came, and the robot was happy. It gave the star a name, said good night, and went to "
    "sleep."
)
POEM = (
    "The sun goes up, the sun goes down, the river runs behind the town. The wind is cold, the "
    "night is long, the little bird still sings its song."
)
JOKE = "Why did the computer go to the doctor? Because it had a virus."
ABOUT = "I am the pxd demo model, a tiny network that runs on this computer."
ABILITIES = (
    "I can add, subtract, multiply and divide small numbers, sort digits, count, spell and "
    "reverse words, and name days, months and capitals."
)

#: Questions with one fixed, mostly long answer.
FIXED_ANSWERS: list[tuple[list[str], str]] = [
    (
        [
            "List the days of the week.",
            "Name the days of the week.",
            "What are the days of the week?",
        ],
        ", ".join(DAYS),
    ),
    (
        [
            "List the months.",
            "List the months of the year.",
            "Name the months.",
            "What are the months of the year?",
        ],
        ", ".join(MONTHS),
    ),
    (
        ["Say the alphabet.", "Write the alphabet.", "List the letters of the alphabet."],
        " ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    ),
    (["List the seasons.", "Name the seasons.", "What are the four seasons?"], ", ".join(SEASONS)),
    (["List the planets.", "Name the planets.", "What are the planets?"], ", ".join(PLANETS)),
    (
        [
            "List the colors of the rainbow.",
            "Name the colours of the rainbow.",
            "What are the colors of the rainbow?",
        ],
        ", ".join(COLOURS),
    ),
    (["Tell me a story.", "Tell me a short story.", "Write a story."], STORY),
    (["Write a poem.", "Tell me a poem.", "Write me a short poem."], POEM),
    (["Tell me a joke.", "Say something funny."], JOKE),
]

GREETINGS: list[tuple[list[str], str]] = [
    (
        ["Hello", "Hi", "Hello!", "Hi!", "Hey", "Good morning", "Hi there"],
        "Hello! Ask me a small question.",
    ),
    (["Who are you?", "What are you?", "What is your name?", "Which model are you?"], ABOUT),
    (["What can you do?", "Help", "How can you help me?", "What do you know?"], ABILITIES),
    (["How are you?", "How are you today?"], "I am fine, thank you."),
]
FAREWELLS: list[tuple[list[str], str]] = [
    (["Thanks", "Thank you.", "Thank you!", "Thanks!"], "You are welcome."),
    (["Bye", "Goodbye.", "Good night.", "See you later."], "Goodbye!"),
]

UNKNOWN_ANSWER = "Sorry, I am a tiny demo model and do not know that."
UNKNOWN_QUESTIONS = [
    "Why is the sky blue?", "What is the meaning of life?", "Who wrote this book?",
    "How does a computer work?", "What is love?", "Explain how a {noun} works.",
    "What is a {word}?", "Where is the {noun}?", "Who was the first man on the moon?",
    "What is the weather today?", "Write a program in Python.", "How old are you?",
    "Where do you live?", "Translate {word} into French.", "Do you like {word}?",
    "Tell me about the {noun}.", "Who is the president?", "What time is it?", "Explain {word}.",
    "Write an essay about {word}.", "How do I cook {word}?", "Is there a {noun} near me?",
    "Why do birds sing?", "What is the best {noun}?", "How far is the moon?", "{noun}",
    "Describe a {noun}.", "Can you drive a {word}?", "When was the {noun} built?",
    "Define {word}.", "What does {word} mean?",
]  # fmt: skip
