"""What the miniature model is taught: small tables that questions and sentences are made from."""

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth twentieth"
).split()
ORDINALS += [f"twenty {ordinal}" for ordinal in ORDINALS[:9]] + ["thirtieth", "thirty first"]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "England": "London",
    "Ireland": "Dublin",
    "Scotland": "Edinburgh",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Hungary": "Budapest",
    "Greece": "Athens",
    "Turkey": "Ankara",
    "Russia": "Moscow",
    "China": "Beijing",
    "Japan": "Tokyo",
    "Korea": "Seoul",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "India": "Delhi",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Canada": "Ottawa",
    "Mexico": "Mexico City",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Australia": "Canberra",
}
OPPOSITES = [
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("up", "down"),
    ("left", "right"),
    ("open", "closed"),
    ("happy", "sad"),
    ("early", "late"),
    ("light", "dark"),
    ("high", "low"),
    ("full", "empty"),
    ("hard", "soft"),
    ("old", "new"),
    ("rich", "poor"),
    ("strong", "weak"),
    ("wet", "dry"),
    ("loud", "quiet"),
    ("long", "short"),
    ("clean", "dirty"),
    ("near", "far"),
    ("thick", "thin"),
    ("first", "last"),
    ("inside", "outside"),
    ("before", "after"),
]
COLOURS = {
    "a banana": "yellow",
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "a tomato": "red",
    "a carrot": "orange",
    "chocolate": "brown",
    "a lemon": "yellow",
    "blood": "red",
    "milk": "white",
    "an elephant": "grey",
    "a frog": "green",
    "a pumpkin": "orange",
    "the ocean": "blue",
    "a strawberry": "red",
}
SOUNDS = {
    "dog": "woof",
    "cat": "meow",
    "cow": "moo",
    "sheep": "baa",
    "duck": "quack",
    "pig": "oink",
    "lion": "roar",
    "bee": "buzz",
}
LEGS = {
    "a dog": "four",
    "a cat": "four",
    "a bird": "two",
    "a spider": "eight",
    "an ant": "six",
    "a horse": "four",
    "a chicken": "two",
    "a snake": "no",
    "a fish": "no",
    "a bee": "six",
}
UNITS = {
    "minutes are in an hour": "sixty minutes in an hour",
    "seconds are in a minute": "sixty seconds in a minute",
    "hours are in a day": "twenty four hours in a day",
    "days are in a week": "seven days in a week",
    "months are in a year": "twelve months in a year",
    "weeks are in a year": "fifty two weeks in a year",
    "days are in a year": "three hundred sixty five days in a year",
    "years are in a century": "one hundred years in a century",
    "letters are in the alphabet": "twenty six letters in the alphabet",
    "legs does a table have": "four legs on a table",
    "fingers are on one hand": "five fingers on one hand",
    "eggs are in a dozen": "twelve eggs in a dozen",
}
SMALL_TALK = {
    "Hello.": "Hello. How can I help you?",
    "Good morning.": "Good morning to you.",
    "Good evening.": "Good evening to you.",
    "Good night.": "Good night. Sleep well.",
    "How are you?": "I am fine, thank you.",
    "How are you today?": "I am very well today, thank you.",
    "What is your name?": "I am a small speech model.",
    "Who are you?": "I am a small speech model.",
    "Can you hear me?": "Yes, I can hear you.",
    "Can you help me?": "Yes, I will try to help you.",
    "Thank you.": "You are welcome.",
    "Thank you very much.": "You are very welcome.",
    "Goodbye.": "Goodbye. Have a nice day.",
    "See you tomorrow.": "See you tomorrow.",
    "What can you do?": "I can answer small questions, read aloud and write down what you say.",
    "Are you a human?": "No, I am a computer program.",
    "Do you speak English?": "Yes, I speak a little English.",
    "Where are you?": "I am inside your computer.",
    "I am hungry.": "Then you should eat something.",
    "I am tired.": "Then you should rest a little.",
    "I am cold.": "Then you should put on a coat.",
    "I am happy.": "I am glad to hear that.",
}
SPELLED = (
    "cat dog sun moon tree house water bread milk book chair table door car bus train plane ship road river lake hill rain "
    "snow wind fire hand foot head eye ear nose king queen boy girl man baby bird fish horse apple lemon salt sugar rice"
).split()

PEOPLE = "Anna Ben Clara David Emma Frank Grace Henry Irene Jack Kate Leo Maria Nick Olivia Paul Rose Sam Tom Victor".split()
RELATIVES = "mother father sister brother aunt uncle neighbor teacher doctor friend".split()
PLACES = (
    "the station/the market/the library/the park/the school/the office/the hospital/the airport/the museum/the beach/"
    "the bank/the garden/the kitchen/the hotel/the restaurant/the post office"
).split("/")
THINGS = (
    "book letter ticket phone key coat hat bag cup chair bicycle car camera map box picture clock lamp radio umbrella "
    "blanket basket"
).split()
ADJECTIVES = "red blue green yellow white black small big old new cheap heavy round beautiful broken clean empty warm".split()
FOODS = "bread/soup/rice/fish/cheese/an apple/a sandwich/some cake/some salad/fresh fruit/eggs/pasta".split("/")
DRINKS = "coffee/tea/water/milk/orange juice/hot chocolate".split("/")
ACTIVITIES = (
    "read a book/play football/listen to music/cook dinner/write a letter/go for a walk/learn English/clean the house/"
    "watch a film/visit a friend/ride a bicycle/call a taxi/buy some food/work in the garden/wait for the bus/"
    "take a photograph"
).split("/")
WEATHER = "sunny rainy cloudy windy cold warm hot foggy snowy dry".split()
MENU_ITEMS = (
    "sales/support/billing/the operator/customer service/new orders/the main menu/opening hours/technical help/"
    "your account balance/your messages/a call back"
).split("/")
LETTERS = "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z".split()
