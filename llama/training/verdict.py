"""What fine-tuning has changed: answers before and after, and whether the model learned, in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llama import Llama, cli
from llama.evaluation.intervals import LEAST_PIECES, LossSums, confidence
from llama.training.options import TrainingOptions
from llama.training.step import Evaluation

ANSWER_LEN = 48  # tokens
Answer = dict[str, Any]  # text; ended: by itself, within ANSWER_LEN tokens. In snapshots, too


def answer(llama: Llama, prompts: Sequence[Sequence[int]]) -> list[Answer]:
    """What the model answers now, greedily."""
    llama.model.eval()
    sequences, _ = llama.generate(prompts, ANSWER_LEN, temperature=0, seed=0)
    return [{"text": llama.tokenizer.decode(ids).strip(), "ended": len(ids) < ANSWER_LEN} for ids in sequences]


def count_right(answers: Sequence[Answer], references: Sequence[str]) -> int:
    """Answers that are the reference, word for word."""
    pairs = zip(answers, references, strict=True)
    return sum(answer["ended"] and answer["text"] == reference for answer, reference in pairs)


def compared(questions: Sequence[str], references: Sequence[str], before: list[Answer], after: list[Answer]) -> str:
    """Answers side by side, and how many are right; the first are to the questions, the others to held-out samples."""
    lines = []
    for question, old, new in zip(questions, before, after, strict=False):
        lines += [f"\n> {question}\n", cli.side_by_side("before", "after"), "-" * (2 * cli.COLUMN + 3)]
        lines.append(cli.side_by_side(old["text"], new["text"]))
    ended = [sum(answer["ended"] for answer in answers) for answers in (before, after)]
    kinds = f"{len(questions)} to the questions above, {len(references)} held out"
    lines.append(f"\n{ended[0]} of {len(after)} answers ({kinds}) ended by themselves before, {ended[1]} after.")
    if references:
        right = [count_right(answers[len(questions) :], references) for answers in (before, after)]
        lines.append(f"{right[0]} of {len(references)} held-out answers were the reference before, {right[1]} after.")
    return "\n".join(lines)


def verdict(options: TrainingOptions, vocab_size: int, before: LossSums, after: LossSums, moved: float) -> list[str]:
    """Whether it learned. before, after: of samples, or of pairs. moved: share of the trained values that changed."""
    lines = [f"{moved:.1%} of the trained values (sampled) are no longer what they were."]
    if not before.counts:
        return [*lines, "No records were held out (held_out=0), so nothing can be said about learning."]
    uniform = math.log(vocab_size)
    if before.loss > uniform:
        lines.append(
            f"ALARM: the loss started at {before.loss:.2f}, above ln(vocabulary) = {uniform:.2f}: worse than guessing. "
            "The weights do not fit the tokenizer, or the labels are wrong."
        )
    # Random weights may start that way; what matters is what training has made better.
    is_copying = isinstance(after, Evaluation) and after.copy_loss < after.loss
    if is_copying and before.copy_loss - after.copy_loss > before.loss - after.loss + 0.1:
        lines.append(
            f"ALARM: the model is better at repeating the token that it was given (loss {after.copy_loss:.2f}) than at "
            f"the next one ({after.loss:.2f}): it was trained on labels that are not shifted."
        )
    losses, held_out = f"Held-out loss {before.loss:.4f} before, {after.loss:.4f} after", len(before.counts)
    if held_out < LEAST_PIECES:
        few = f"too few held-out samples ({held_out} of at least {LEAST_PIECES}) to say whether it learned"
        return [*lines, f"{losses}; {few}."]
    level, fall = confidence(after), confidence(before, after)
    change = before.loss - after.loss
    lines.append(
        f"{losses} [95 %: {level[0]:.4f} to {level[1]:.4f}]; it fell by {change:.4f} [{fall[0]:.4f} to {fall[1]:.4f}]."
    )
    if fall[0] > 0 and change >= 0.01:
        lines.append("It learned.")
    elif fall[1] < 0 and change <= -0.01:
        lines.append("It got worse: use a lower learning rate, or train on more records.")
    else:
        lines.append("It learned nothing that shows.")
        if options.optimizer == "sgd" and options.lora and not options.adapter:
            lines.append(
                f"SGD at lr {options.lr:g} hardly moves LoRA: its B starts at zero, and the gradient of A with it. "
                "The preset learn has settings that do."
            )
    return lines
