"""The words that the generators draw from."""

FIRST_NAMES = (
    "Ana", "Ben", "Carla", "David", "Elena", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Kira",
    "Leo", "Maria", "Nina", "Oscar", "Paula", "Quinn", "Rosa", "Sam", "Tara", "Uma", "Victor",
    "Wendy", "Xavier", "Yara", "Zoe", "Adam", "Bella", "Chris", "Diana", "Emil", "Fiona", "George",
    "Hannah", "Ivan", "Julia",
)  # fmt: skip
LAST_NAMES = (
    "Adler", "Brown", "Cruz", "Dean", "Evans", "Fischer", "Garcia", "Hall", "Ito", "Jones", "Kim",
    "Lopez", "Meyer", "Novak", "Olsen", "Park", "Reed", "Silva", "Turner", "Unger", "Vega", "Weber",
    "Young", "Ziegler", "Baker", "Clark",
)  # fmt: skip
CITIES = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Prague", "Oslo", "Dublin", "Athens",
    "Lisbon", "Warsaw", "Tokyo", "Osaka", "Seoul", "Beijing", "Delhi", "Cairo", "Nairobi", "Lagos",
    "Lima", "Bogota", "Quito", "Toronto", "Boston", "Chicago", "Denver", "Seattle", "Miami",
    "Dallas", "Houston", "Sydney", "Perth", "Auckland", "Hanoi", "Manila", "Jakarta", "Dubai",
    "Geneva", "Zurich", "Milan", "Naples", "Porto", "Krakow", "Riga",
)  # fmt: skip
JOBS = (
    "baker", "doctor", "teacher", "farmer", "pilot", "nurse", "painter", "singer", "lawyer",
    "plumber", "writer", "driver", "cook",
)  # fmt: skip
COLORS = (
    "red", "blue", "green", "yellow", "black", "white", "brown", "purple", "orange", "pink",
)  # fmt: skip
PETS = (
    "cat", "dog", "horse", "rabbit", "parrot", "turtle", "hamster", "fish",
)  # fmt: skip
SKIES = (
    "sun", "rain", "snow", "clouds", "wind", "fog",
)  # fmt: skip
FIELDS = (
    "phone", "age", "city", "job",
)  # fmt: skip

CAPITALS = (
    ("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Germany", "Berlin"),
    ("Austria", "Vienna"), ("Norway", "Oslo"), ("Ireland", "Dublin"), ("Greece", "Athens"),
    ("Portugal", "Lisbon"), ("Poland", "Warsaw"), ("Japan", "Tokyo"), ("China", "Beijing"),
    ("India", "Delhi"), ("Egypt", "Cairo"), ("Kenya", "Nairobi"), ("Peru", "Lima"),
    ("Ecuador", "Quito"), ("Vietnam", "Hanoi"), ("Latvia", "Riga"), ("England", "London"),
)  # fmt: skip
SOUNDS = (
    ("dog", "barks"), ("cat", "meows"), ("cow", "moos"), ("horse", "neighs"), ("duck", "quacks"),
    ("lion", "roars"), ("sheep", "bleats"), ("owl", "hoots"), ("bee", "buzzes"), ("wolf", "howls"),
)  # fmt: skip
LEGS = (
    ("dog", 4), ("cat", 4), ("bird", 2), ("spider", 8), ("ant", 6), ("horse", 4), ("bee", 6),
    ("duck", 2), ("fish", 0), ("snake", 0), ("cow", 4), ("crab", 10),
)  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("up", "down"), ("day", "night"),
    ("old", "new"), ("wet", "dry"), ("light", "dark"), ("open", "closed"), ("happy", "sad"),
    ("full", "empty"), ("hard", "soft"),
)  # fmt: skip
THING_COLORS = (
    ("grass", "green"), ("snow", "white"), ("the sky", "blue"), ("coal", "black"),
    ("a lemon", "yellow"), ("blood", "red"), ("chocolate", "brown"), ("milk", "white"),
    ("a carrot", "orange"), ("the night", "black"),
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
