"""What is taught in each update of a warm-up: the lessons of its phases, from labelled questions."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, islice, pairwise

from upt.answers import is_correct
from upt.data import shapes
from upt.errors import SettingError
from upt.model.policy import Policy
from upt.run.settings import Rollout
from upt.warmup import lessons
from upt.warmup.demonstrations import MODES, STYLES, demonstrate, guess_or_demonstrate
from upt.warmup.lessons import Lesson


class Curriculum:
    """Batches of lessons for a policy. `config` is a warmup.Config; no question is in two of its three parts."""

    def __init__(self, config):
        self.config = config
        sizes = (config.questions, config.judged, config.asking * config.judge_steps)
        if sum(sizes) > shapes.LIMITS["warmup"]:
            raise SettingError(
                f"--questions {sizes[0]}, --judged {sizes[1]} and --asking x --judge-steps {sizes[2]} are more than "
                f"the {shapes.LIMITS['warmup']} pictures that there are with labels: give fewer"
            )
        every = shapes.questions("warmup", config.seed, sum(sizes))
        self.items, self.judged, self.pictures = (
            every[start:end] for start, end in pairwise(accumulate(sizes, initial=0))
        )
        self.rng = random.Random(f"warmup/{config.seed}")
        self.rng_asking = random.Random(f"warmup/asking/{config.seed}")
        self.stream = self.epochs()

    def epochs(self) -> Iterator[tuple[shapes.Item, str]]:
        """Questions, over and over in a new order, with the prompt style that each is to be answered in."""
        while True:
            for item in self.rng.sample(self.items, len(self.items)):
                yield item, STYLES[1] if self.rng.random() < 0.25 else STYLES[0]

    def demonstrations(self, policy: Policy) -> list[Lesson]:
        """Right steps, each with its question to be foreseen."""
        return [
            lessons.with_question(policy, lessons.lesson(policy, item, style, demonstrate(item, style)), item)
            for item, style in islice(self.stream, self.config.batch)
        ]

    def answering(self, policy: Policy) -> Iterator[list[Lesson]]:
        for _ in range(self.config.answer_steps):
            yield self.demonstrations(policy)

    def judging(self, policy: Policy, sampling: Rollout) -> Iterator[list[Lesson]]:
        """Demonstrations, verdicts on what the policy answers by now, and questions."""
        answers = lessons.own_answers(policy, self.judged, replace(sampling, group_size=2))
        whole = [(item, policy.tokenizer.decode(ids)) for item, of in zip(self.judged, answers) for ids in of]
        right = sum(is_correct(text, item.gold) for item, text in whole)
        print(f"judging: of {2 * len(answers)} answers {len(whole)} came to an end, {right} of them right", flush=True)
        each, asked = self.config.judging, self.config.asking
        for step in range(self.config.judge_steps):
            places = [n % len(answers) for n in range(step * each, (step + 1) * each)]
            verdicts = [lessons.verdicts(policy, self.judged[n], answers[n]) for n in places]
            questions = [self.asking(policy, n) for n in range(step * asked, (step + 1) * asked)]
            yield self.demonstrations(policy) + verdicts + questions

    def asking(self, policy: Policy, n: int) -> Lesson:
        """The n-th picture with two questions to it, or with one that is shown and two others."""
        item = self.pictures[n]
        # A picture that has one question only is to get it again: upt/groups/filters.py knows a repetition.
        other, second = (shapes.ask_else(item, self.rng_asking) or item.question for _ in range(2))
        mode, first = (MODES[1], other) if n % 2 else (MODES[0], item.question)
        return lessons.asking_lesson(policy, item, mode, [first, second])

    def guessing(self, policy: Policy) -> Iterator[list[Lesson]]:
        """Right steps and quick guesses."""
        share, wrong = self.config.guess_share, self.config.guess_wrong
        for _ in range(self.config.guess_steps):
            yield [
                lessons.lesson(policy, item, style, guess_or_demonstrate(item, style, self.rng, share, wrong))
                for item, style in islice(self.stream, self.config.batch)
            ]
