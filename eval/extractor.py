"""A model that finds the final answer of responses in which rules found none (prompts/extract.md).

It reads the question and the end of the response, no picture, and answers greedily in a box.
"""

from collections.abc import Sequence

from eval.benchmark import Question
from eval.extraction import LETTERS
from upt.answers import extract_answer
from upt.model import decoding
from upt.model.policy import Policy
from upt.prompts import PROMPTS
from upt.run.settings import Rollout

END = 2000  # characters of a response that it reads
AT_ONCE = 64
SETTINGS = Rollout(temperature=0.0, top_p=1.0, max_new_tokens=64, seed=0)


def load(config) -> Policy:
    """The policy of a Config with `model`, `adapter`, `any_base` and `device`."""
    return Policy.load(config.model, adapter=config.adapter, device=config.device, any_base=config.any_base)


def read(policy: Policy, unread: Sequence[tuple[dict, Question, str]]) -> list[str | None]:
    """The final answer of each (row, question, response), None where the model finds none either."""
    head, tail = (PROMPTS / "extract.md").read_text(encoding="utf-8").strip().split("{response}")
    found = []
    for start in range(0, len(unread), AT_ONCE):
        prompts = []
        for _, question, response in unread[start : start + AT_ONCE]:
            options = (f"\n{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=False))
            asked = policy.plain(question.text + "".join(options))
            text = head.replace("{question}", asked) + policy.plain(response[-END:]) + tail
            ids = policy.tokens(policy.chat([("user", text)], False), opens=True)
            prompts.append(policy.place(question.id, ids, None))
        sampled = decoding.generate(policy, prompts, [0] * len(prompts), SETTINGS)
        texts = policy.tokenizer.batch_decode([r.ids for r in sampled], skip_special_tokens=True)
        answers = [extract_answer(text) for text in texts]
        found += [None if answer is None or answer.lower() == "none" else answer for answer in answers]
    return found
