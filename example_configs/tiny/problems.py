"""Seeded generator of small arithmetic word problems in GSM8K's answer format.

What: an endless stream of two- and three-step problems, each with a chain of thought and a last
line ``#### 27``. Question and solution are each phrased in several ways, drawn at random, so a
model trained on them keeps a distribution over valid solutions and is no one-hot oracle.
Why: a real (trained, disagreeing) teacher/student pair that fits in a repository; see make_pair.py.

    >>> rng = random.Random(0)
    >>> problem = draw_problem(rng, split="train")
    >>> problem.question, problem.answer, problem.split

The splits are disjoint in the *arithmetic*: a problem's split is a hash of its equations alone
(``4+35=39;39-12=27``), so neither another phrasing nor another story of it is in another split.
"""

import hashlib
import random
from dataclasses import dataclass

MAX_NUMBER = 99  # largest result of any step
MAX_START = 60
MAX_CHANGE = 40
MIN_NUMBER = 2  # no ones and zeros: every noun stays in the plural

SPLIT_BUCKETS = 20  # bucket 0 is test, bucket 1 is validation, the rest is train

PRONOUNS = {
    "Gus": ("he", "his"),
    "Ben": ("he", "his"),
    "Tom": ("he", "his"),
    "Leo": ("he", "his"),
    "Max": ("he", "his"),
    "Mia": ("she", "her"),
    "Ana": ("she", "her"),
    "Zoe": ("she", "her"),
    "Ivy": ("she", "her"),
    "Eva": ("she", "her"),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One line of arithmetic; ``operator`` is ``+``, ``-`` or ``*``."""

    left: int
    operator: str
    right: int

    @property
    def result(self) -> int:
        if self.operator == "+":
            return self.left + self.right
        if self.operator == "-":
            return self.left - self.right
        return self.left * self.right

    @property
    def equation(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.result}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its worked answer and the arithmetic under both."""

    question: str
    answer: str
    steps: tuple[Step, ...]

    @property
    def key(self) -> str:
        """The arithmetic alone, e.g. ``4+35=39;39-12=27``: what the splits are disjoint in."""
        return ";".join(step.equation.replace(" ", "") for step in self.steps)

    @property
    def split(self) -> str:
        return split_of(self.key)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]


@dataclass(frozen=True, slots=True)
class Story:
    """Phrases of one setting.

    Fields of the templates: ``who`` (a name), ``his``, ``things``, ``n`` (a number) and ``eq``
    (a number, or an equation where the solution states one).
    """

    things: tuple[str, ...]
    openings: tuple[str, ...]
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    doublings: tuple[str, ...]
    questions: tuple[str, ...]
    states: tuple[str, ...]
    about_person: bool  # the events' subject is the person; otherwise each event names its own


STORIES = (
    Story(
        things=("figs", "shells", "coins", "cards", "beads"),
        openings=("{who} has {n} {things}.", "{who} starts with {n} {things}."),
        gains=("finds {n} more", "buys {n} more", "gets {n} from a friend"),
        losses=("loses {n}", "gives {n} away", "sells {n}"),
        doublings=("doubles {his} {things}",),
        questions=(
            "How many {things} does {who} have now?",
            "How many {things} does {who} have in the end?",
        ),
        states=("{who} has {eq} {things}", "{who} now has {eq}"),
        about_person=True,
    ),
    Story(
        things=("dollars",),
        openings=("{who} has {n} dollars.", "There are {n} dollars in {who}'s purse."),
        gains=("earns {n} more", "is paid {n}", "wins {n}"),
        losses=("spends {n}", "pays {n} for lunch", "lends {n} to a friend"),
        doublings=("doubles {his} money",),
        questions=("How much money does {who} have now?", "How many dollars does {who} have left?"),
        states=("{who} has {eq} dollars", "{who} now has {eq}"),
        about_person=True,
    ),
    Story(
        things=("rolls", "cakes", "pies"),
        openings=("{who} runs a bakery and has {n} {things}.", "{who} has {n} {things} to sell."),
        gains=("bakes {n} more", "makes {n} more"),
        losses=("sells {n}", "burns {n}", "sends {n} to a school"),
        doublings=("doubles the number of {things}",),
        questions=("How many {things} are left?", "How many {things} does {who} have now?"),
        states=("{who} has {eq} {things}", "there are {eq} {things}"),
        about_person=True,
    ),
    Story(
        things=("people",),
        openings=("A bus has {n} people on it.", "{n} people are on a bus."),
        gains=("{n} get on", "{n} more step in"),
        losses=("{n} get off", "{n} leave"),
        doublings=("the number of people doubles",),
        questions=("How many people are on the bus now?", "How many people are still on the bus?"),
        states=("there are {eq} people", "the bus has {eq}"),
        about_person=False,
    ),
    Story(
        things=("ducks", "geese", "frogs"),
        openings=("There are {n} {things} at a pond.", "A pond has {n} {things}."),
        gains=("{n} more arrive", "{n} come back"),
        losses=("{n} leave", "{n} swim away"),
        doublings=("the number of {things} doubles",),
        questions=("How many {things} are there now?", "How many {things} are at the pond?"),
        states=("there are {eq} {things}", "the pond has {eq}"),
        about_person=False,
    ),
    Story(
        things=("books", "films", "games"),
        openings=("A library has {n} {things} on a shelf.", "There are {n} {things} on a shelf."),
        gains=("{n} are brought back", "{n} more arrive", "{n} are added"),
        losses=("{n} are lent out", "{n} are sold"),
        doublings=("the number of {things} doubles",),
        questions=("How many {things} are on the shelf now?", "How many {things} are there now?"),
        states=("there are {eq} {things}", "the shelf has {eq}"),
        about_person=False,
    ),
)

COMPARED_THINGS = ("figs", "shells", "coins", "cards", "beads", "books", "games")
QUESTION_LINKS = ("Then", "After that", "Later")
SOLUTION_LINKS = ("Then", "After that", "Next")


def split_of(key: str) -> str:
    bucket = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % SPLIT_BUCKETS
    return {0: "test", 1: "validation"}.get(bucket, "train")


def draw_problem(rng: random.Random, split: str | None = None) -> Problem:
    """The next problem of ``rng``; with ``split``, the next one which falls in that split."""
    while True:
        problem = _draw_comparison(rng) if rng.random() < 0.2 else _draw_chain(rng)
        if split is None or problem.split == split:
            return problem


def draw_distinct(rng: random.Random, split: str, count: int) -> list[Problem]:
    """``count`` problems of ``split``, no two with the same arithmetic."""
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = draw_problem(rng, split)
        problems.setdefault(problem.key, problem)
    return list(problems.values())


def draw_drill(rng: random.Random, num_steps: int = 7) -> tuple[str, str]:
    """Bare arithmetic as (question, answer): one number carried through ``num_steps`` equations."""
    steps = _draw_steps(rng, choices=(num_steps,))
    equations = " ".join(f"{step.equation}." for step in steps)
    return f"Start at {steps[0].left} and go on.", equations


def final_answer(text: str) -> str | None:
    """What follows the last ``####``, stripped; None where there is none."""
    _, mark, tail = text.rpartition("####")
    return tail.strip() if mark else None


def _in_range(number: int) -> bool:
    return MIN_NUMBER <= number <= MAX_NUMBER


def _draw_steps(rng: random.Random, choices: tuple[int, ...] = (2, 3)) -> tuple[Step, ...]:
    """Steps that each start from the result of the one before; at most one doubles."""
    number, steps = rng.randint(MIN_NUMBER, MAX_START), []
    num_steps = rng.choice(choices)
    while len(steps) < num_steps:
        operator = rng.choices("+-*", weights=(5, 5, 1))[0]
        right = 2 if operator == "*" else rng.randint(MIN_NUMBER, MAX_CHANGE)
        step = Step(number, operator, right)
        doubled = any(earlier.operator == "*" for earlier in steps)
        if _in_range(step.result) and not (doubled and operator == "*"):
            steps.append(step)
            number = step.result
    return tuple(steps)


def _draw_chain(rng: random.Random) -> Problem:
    """One quantity that changes two or three times."""
    story, steps = rng.choice(STORIES), _draw_steps(rng)
    who = rng.choice(tuple(PRONOUNS))
    pronoun, his = PRONOUNS[who]
    fields = {"who": who, "his": his, "things": rng.choice(story.things)}

    opening = rng.choice(story.openings).format(n=steps[0].left, **fields)
    events = [_event(rng, story, step, fields) for step in steps]
    narration = _narrate(rng, events, pronoun if story.about_person else "")
    asked = rng.choice(story.questions).format(**fields)
    return Problem(
        question=f"{opening} {narration} {asked}",
        answer=_solve(rng, story.states, steps, fields),
        steps=steps,
    )


def _event(rng: random.Random, story: Story, step: Step, fields: dict[str, str]) -> str:
    phrases = {"+": story.gains, "-": story.losses, "*": story.doublings}[step.operator]
    return rng.choice(phrases).format(n=step.right, **fields)


def _narrate(rng: random.Random, events: list[str], subject: str) -> str:
    """``He finds 35 more, then loses 12.`` or one sentence an event."""
    lead = f"{subject} " if subject else ""
    first, *rest = events
    if rng.random() < 0.5:
        body, last = ", ".join([first, *rest[:-1]]), rest[-1]
        return _capitalised(f"{lead}{body}{rng.choice((', then', ' and then'))} {last}.")
    links = rng.sample(QUESTION_LINKS, len(rest))
    sentences = [_capitalised(f"{lead}{first}.")]
    sentences += [f"{link} {lead}{event}." for link, event in zip(links, rest, strict=True)]
    return " ".join(sentences)


def _solve(
    rng: random.Random, states: tuple[str, ...], steps: tuple[Step, ...], fields: dict[str, str]
) -> str:
    """A chain of thought whose sentences are drawn one by one, then the ``####`` line."""
    sentences, links = [], rng.sample(SOLUTION_LINKS, len(steps))
    for index, step in enumerate(steps):
        stated = rng.choice(states).format(eq=step.equation, **fields)
        if index == 0:
            forms = (stated, f"first {step.equation}", step.equation)
        else:
            outcome = {"+": "that makes", "-": "that leaves", "*": "twice that is"}[step.operator]
            link = links[index]
            forms = (f"{link} {stated}", f"{link} {step.equation}", f"{outcome} {step.equation}")
        sentences.append(_capitalised(f"{rng.choice(forms)}."))
    return _finish(rng, sentences, steps[-1].result)


def _draw_comparison(rng: random.Random) -> Problem:
    """Two owners, the second one's share given relative to the first's; then what both have."""
    steps = _draw_comparison_steps(rng)
    who, other = rng.sample(tuple(PRONOUNS), 2)
    things = rng.choice(COMPARED_THINGS)
    relation = {"+": "{n} more than", "-": "{n} fewer than", "*": "twice as many as"}
    compared = relation[steps[0].operator].format(n=steps[0].right)
    sentences = [f"{who} has {steps[0].left} {things}.", f"{other} has {compared} {who}."]
    if len(steps) == 3:
        event = rng.choice(("Together they lose {n}.", "They give away {n} of them."))
        sentences.append(event.format(n=steps[2].right))
        sentences.append(f"How many {things} do they have left?")
    else:
        ending = rng.choice(("together", "in all"))
        sentences.append(f"How many {things} do they have {ending}?")

    first = rng.choice((f"{other} has {steps[0].equation} {things}", steps[0].equation))
    both = rng.choice(("Together they have", "In all they have", "Both together have"))
    solution = [f"{first}.", f"{both} {steps[1].equation}."]
    if len(steps) == 3:
        link = rng.choice(("That leaves", "Then", "Then they have"))
        solution.append(f"{link} {steps[2].equation}.")
    return Problem(
        question=" ".join(sentences),
        answer=_finish(rng, solution, steps[-1].result),
        steps=steps,
    )


def _draw_comparison_steps(rng: random.Random) -> tuple[Step, ...]:
    while True:
        start = rng.randint(MIN_NUMBER, MAX_START)
        operator = rng.choices("+-*", weights=(5, 5, 2))[0]
        second = Step(start, operator, 2 if operator == "*" else rng.randint(MIN_NUMBER, 40))
        total = Step(start, "+", second.result)
        steps = (second, total)
        if rng.random() < 0.5:
            steps += (Step(total.result, "-", rng.randint(MIN_NUMBER, MAX_CHANGE)),)
        if all(_in_range(step.result) for step in steps):
            return steps


def _finish(rng: random.Random, sentences: list[str], result: int) -> str:
    endings = ("", "", f" The answer is {result}.", f" So it is {result}.")
    return f"{' '.join(sentences)}{rng.choice(endings)}\n#### {result}"


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]
