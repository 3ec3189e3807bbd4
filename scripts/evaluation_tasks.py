"""The tasks of evaluate.py: what is set into a long text, what is asked, and what is right.

The kinds are RULER's, the sentences our own.  Those about facts and variables have the form that
the bundled model was trained on (scripts/train_bundled_model.py), with new combinations and
values; the others need a model that follows instructions.

A task is a function of a Maker that gives a Sample: a context and as many questions about it as are
wanted, or as the task has.  Each is asked by itself, for one or more things, one after the other
with the answers to those before in sight.
"""
import random
import re
from dataclasses import dataclass

from evaluate_needles import ADJECTIVES, ATTRIBUTES, DIGITS, NOUNS

BLOCK_TOKENS = 64
PEOPLE = ("Edmund|Clara|Tobias|Harriet|Silas|Rosamund|Ambrose|Judith|Caleb|Winifred|Osmund|"
          "Beatrice").split("|")
PLACES = ("under the third stair|behind the kitchen clock|in the hollow oak|inside the old piano|"
          "beneath the chapel floor|on top of the dresser|in the miller's cart|under a loose tile"
          ).split("|")


@dataclass
class Ask:
    question: str    # as the user's turn of a chat
    tail: str        # as the end of a prompt that is to be completed
    expected: list
    max_tokens: int


@dataclass
class Sample:
    context: object  # a text, or token ids where their places matter
    questions: list  # lists of Ask
    depths: list = None  # where the answer of each stands, 0 to 1, if that is one place


class Haystack:
    """Prose, cut to length at the ends of sentences."""

    def __init__(self, text, tokens_of_all):
        self.sentences = re.split(r"(?<=[.!?])\s+", text.strip())
        self.tokens_per_character = tokens_of_all / len(text)

    def tokens_of(self, text):
        return len(text) * self.tokens_per_character

    def cut(self, n_tokens, rng):
        """Consecutive sentences from a random one on, going on at the beginning after the end."""
        start, out, spent = rng.randrange(len(self.sentences)), [], 0.0
        for i in range(len(self.sentences)):
            sentence = self.sentences[(start + i) % len(self.sentences)]
            spent += self.tokens_of(sentence + " ")
            if spent > n_tokens:
                return out
            out.append(sentence)
        raise ValueError(f"the text has fewer than {n_tokens} tokens")


class Maker:
    """One sample's random numbers, its length, its place among the samples (0 to 1), and how many
    questions are wanted."""

    def __init__(self, haystack, tokenise, n_tokens, share, seed, questions=1):
        self.haystack, self.tokenise = haystack, tokenise
        self.n_tokens, self.share, self.rng = n_tokens, share, random.Random(seed)
        self.questions = questions

    def number(self):
        return "".join(self.rng.choices("0123456789", k=DIGITS))

    def subjects(self, n):
        return self.rng.sample([f"{a} {b}" for a in ADJECTIVES for b in NOUNS], n)

    def facts(self, n, attribute=None):
        """n facts about different things; of one kind, if it is given."""
        return [(attribute or self.rng.choice(ATTRIBUTES), s, self.number())
                for s in self.subjects(n)]

    def context(self, statements, room=120, depths=None):
        """Prose with the statements in their order, at random places or at these (0 to 1)."""
        spent = self.haystack.tokens_of(" ".join(statements))
        # Numbers are more tokens a character than prose.
        sentences = self.haystack.cut(self.n_tokens - room - 2 * spent, self.rng)
        places = sorted(self.rng.randrange(len(sentences) + 1) for _ in statements)
        if depths:
            places = [round(d * len(sentences)) for d in depths]
        for place, statement in reversed(list(zip(places, statements))):
            sentences.insert(place, statement)
        return " ".join(sentences)


def state(attribute, subject, value):
    return f"The {attribute} of the {subject} is {value}."


def ask_for(attribute, subject, value):
    question = f"What is the {attribute} of the {subject}?"
    return Ask(question, f"{question} The {attribute} of the {subject} is", [value], DIGITS + 2)


# ---- facts

def needle(m):
    """One fact, from the beginning of the text to its end over the samples; with several questions
    as many facts, one in each part of the text."""
    facts = m.facts(m.questions)
    depths = [(i + m.share) / m.questions for i in range(m.questions)]
    return Sample(m.context([state(*f) for f in facts], depths=depths),
                  [[ask_for(*f)] for f in facts], depths)


def ending(m):
    """Facts right before their question, whose last digit is doubled: what is hard is to stop."""
    facts = [(a, s, v[:-1] + v[-2]) for a, s, v in m.facts(m.questions)]
    asks = [ask_for(*f) for f in facts]
    for ask, fact in zip(asks, facts):
        ask.question, ask.tail = (f"{state(*fact)} {x}" for x in (ask.question, ask.tail))
    return Sample(m.context([]), [[ask] for ask in asks])


def border(m):
    """A fact for each question, whose value lies across the border of two blocks."""
    facts = m.facts(m.questions)
    pieces = [(m.tokenise(f" The {a} of the {s} is"), m.tokenise(f" {v}.")) for a, s, v in facts]
    ids = m.tokenise(m.context([], room=120 + sum(len(h) + len(t) for h, t in pieces)))
    # Two blocks apart, so that none is set into another; those before stay where they are.
    blocks = m.rng.sample(range(2, len(ids) // BLOCK_TOKENS, 2), m.questions)
    for block, (head, tail) in zip(sorted(blocks), pieces):
        at = block * BLOCK_TOKENS - len(head) - len(tail) // 2
        ids[at:at] = head + tail
    return Sample(ids, [[ask_for(*f)] for f in facts])


def multikey(m):
    """Sixteen facts of one kind; a question asks for one."""
    facts = m.facts(16, attribute=m.rng.choice(ATTRIBUTES))
    return Sample(m.context([state(*f) for f in facts]),
                  [[ask_for(*f)] for f in m.rng.sample(facts, min(m.questions, 16))])


def multivalue(m):
    """Three values of one thing at three places, all asked for at once."""
    attribute, subject = m.rng.choice(ATTRIBUTES), m.subjects(1)[0]
    values = [m.number() for _ in range(3)]
    question = f"What are all three values of the {attribute} of the {subject}?"
    return Sample(m.context([state(attribute, subject, v) for v in values]),
                  [[Ask(question, f"{question} The {attribute} of the {subject} is", values, 50)]])


def multiquery(m):
    """Four facts, asked for one after the other; each question begins with another of them."""
    facts = [(a, s, m.number()) for a, s in zip(m.rng.sample(ATTRIBUTES, 4), m.subjects(4))]
    asked = [ask_for(*f) for f in m.rng.sample(facts, 4)]
    return Sample(m.context([state(*f) for f in facts]),
                  [asked[i:] + asked[:i] for i in range(min(m.questions, 4))])


def tracking(m):
    """A variable that is given another's value, among others of that kind."""
    names = m.rng.sample([a + b + c for a in "ABCDEFGH" for b in "JKLMN" for c in "PQRSTUVWXYZ"], 8)
    chains = [(names[i], names[i + 1], str(m.rng.randrange(10000, 99999))) for i in range(0, 8, 2)]
    first = [f"VAR {a} = {v}." for a, b, v in chains]
    second = [f"VAR {b} = {a}." for a, b, v in chains]
    return Sample(m.context(first + second),
                  [[Ask(f"What number is the value of the variable {b}?", f"{b} =", [value], 20)]
                   for _, b, value in m.rng.sample(chains, min(m.questions, 4))])


def json_facts(m):
    """Sixteen facts, all to be written as one JSON object."""
    attribute = m.rng.choice(ATTRIBUTES)
    facts = m.facts(16, attribute=attribute)
    order = f"Write the {attribute} of each thing that has one as a JSON object, by name."
    return Sample(m.context([state(*f) for f in facts], room=600),
                  [[Ask(order, order + ' {"', [f"{s}={v}" for _, s, v in facts], 440)]])


def right_json(expected, answer):
    pairs = dict(re.findall(r'"?(?:the )?([a-z]+ [a-z]+)"\s*:\s*"?(\d+)', answer.lower()))
    return sum(pairs.get(e.split("=")[0]) == e.split("=")[1] for e in expected)


# ---- prose

def question(m):
    """Who hid what where, among others who did."""
    people, things = m.rng.sample(PEOPLE, 6), m.rng.sample(NOUNS, 6)
    hidden = list(zip(people, things, m.rng.sample(PLACES, 6)))

    def ask(who, what, where):
        asked = f"Where did {who} hide the {what}?"
        return Ask(asked, f"{asked} {who} hid the {what}", [where], 12)
    return Sample(m.context([f"{p} hid the {t} {w}." for p, t, w in hidden]),
                  [[ask(*h)] for h in m.rng.sample(hidden, min(m.questions, 6))])


# ---- counting

def common_words(m):
    """A list of words; ten of them occur ten times as often as the others."""
    known = {w for s in m.haystack.sentences for w in re.findall(r"\b[a-z]{5,9}\b", s)}
    n_words = int((m.n_tokens - 120) / m.haystack.tokens_of("xxxxxxx "))
    n_rare = min(len(known) - 10, n_words // 3 - 100)
    times = n_words // (n_rare + 100)
    words = m.rng.sample(sorted(known), 10 + n_rare)
    listed = words[:10] * 10 * times + words[10:] * times
    m.rng.shuffle(listed)
    asked = "What are the ten most common words of this list?"
    tail = f"{asked} The ten most common words of this list are"
    return Sample(" ".join(listed) + ".", [[Ask(asked, tail, words[:10], 60)]])


def frequent_words(m):
    """Words of no language, the n-th of which occurs in proportion to 1 / n^2."""
    syllables = [a + b for a in "bdfgklmnprstv" for b in "aeiou"]
    words = ["".join(m.rng.sample(syllables, 3)) for _ in range(50)]
    # Such words are split into pieces: about one token for two characters.
    n_words = (m.n_tokens - 120) // 4
    listed = m.rng.choices(words, [1 / (n + 1) ** 2 for n in range(len(words))], k=n_words)
    top = sorted(set(listed), key=listed.count, reverse=True)[:3]
    asked = "What are the three most frequent words of this text?"
    return Sample(" ".join(listed) + ".",
                  [[Ask(asked, f"{asked} The three most frequent words of this text are", top,
                        24)]])


TASKS = {f.__name__: f for f in (needle, ending, border, multikey, multivalue, multiquery,
                                 tracking, json_facts, question, common_words, frequent_words)}


def right_of(task, expected, answer):
    """How many of what is expected the answer has."""
    if task == "json_facts":
        return right_json(expected, answer)
    return sum(bool(re.search(rf"(?<!\w){re.escape(e)}(?!\w)", answer, re.I)) for e in expected)
