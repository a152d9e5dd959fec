"""What generated prompts ask: so many pictures and such words that prompts differ in length and in what they want."""

# Pictures per prompt and its words: a text alone, short and long questions, two pictures. Compared closely.
FIRST = (
    (1, "What is in the picture?"),
    (1, "Describe everything that you can see, from left to right, and then say how many things there are."),
    (0, "Hello!"),
    (2, "Which of the two pictures is brighter?"),
    (1, "Is it red?"),
    (1, "Read the text."),
)
MORE = ((3, "How many of them are drawn?"), (4, "Put the four in order."))  # for a full verification

_ONE = (
    "What is this?",
    "What colour is it?",
    "How many colours are there?",
    "Count the squares.",
    "Is there a person?",
    "Where was this taken?",
    "What stands in the upper left corner?",
    "What stands in the lower right corner, and what is beside it?",
    "Give the picture a title of at most five words.",
    "Describe the picture in one sentence.",
    "Describe the picture in detail.",
    "Is it day or night? Answer with one word.",
    "Is this a photo, a drawing or a chart? Say why you think so.",
    "Which colour covers the largest part?",
    "Which two things lie next to each other?",
    "Is the left half darker than the right half? Answer yes or no.",
    "List every object, one to a line.",
    "What would you ask the person who made this picture?",
    "Translate what is written here into English.",
    "What number do you see?",
    "Answer with a single letter. A: an animal. B: a building. C: something else.",
    "Is anything cut off at the edges? If so, at which one, and how much of it can still be seen?",
    "Explain this picture to a child of six years.",
    "Write a caption for a newspaper.",
    "What is unusual about it?",
    "Which season is it?",
    "How far away is the nearest thing, roughly, in metres?",
    "Name three words that describe the mood.",
    "Return JSON with the keys object, colour and count.",
    "Does the picture show what the sentence says? Sentence: two cats sit on a red sofa.",
    "What happened a minute before?",
    "Would this picture look the same upside down?",
    "Look closely at the middle of the picture. What is there, which colour has it, and what does it touch?",
    "Are there more blue things than green things?",
    "What is the person in the picture about to do?",
    "Say nothing but the name of the main colour.",
)
_TWO = (
    "What has changed?",
    "Which one has more colours?",
    "Do both show the same thing? Answer yes or no, and give the reason.",
    "Describe the first picture, then the second, then what they have in common.",
    "Which one would you print larger?",
    "In which of the two is the largest thing nearer to the left edge?",
)
_NONE = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "2 + 2 =",
    "Thank you!",
    "Who are you, and what can you do?",
    "Name the seven days of the week in order, beginning with Sunday.",
    "Say this backwards: stone.",
    "How do I boil an egg?",
    "Is a whale a fish?",
    "Translate into German: good morning.",
)


def further_question(number: int) -> tuple[int, str]:
    """Pictures and words of the pair of this number after FIRST: of twenty one has no picture, two have two."""
    if number % 20 == 7:
        return 0, _NONE[number // 20 % len(_NONE)]
    if number % 10 == 3:
        return 2, _TWO[number // 10 % len(_TWO)]
    return 1, _ONE[number % len(_ONE)]
