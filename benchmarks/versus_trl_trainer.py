"""TRL's side of versus_trl.py, run in TRL's own environment: GRPOTrainer on the prompts of a JSON file.

Writes a JSON line for each evaluation on the held-out prompts: response tokens sampled so far, seconds of training so
far without evaluations, and the rewards. Uses only the reward rule of poise.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from poise.orchestrator.rewards.verifiers import exact


def reply(completion: Any) -> str:
    """Return the text of a completion; of a conversation, its last message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


class Watch(TrainerCallback):
    """Count tokens, pause the clock for evaluations, and stop training at the budget."""

    def __init__(self, spec: dict[str, Any], tokenizer: Any) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._tokens = 0
        self._next = 0
        self._seconds = 0.0
        self._since = time.monotonic()

    def reward(
        self, completions: list[Any], answer: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        """Return the rewards of sampled completions, and count their tokens."""
        self._tokens += sum(map(len, completion_ids))
        return [exact(reply(c), a) for c, a in zip(completions, answer, strict=True)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()
        self._evaluate(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = self._tokens >= self._spec["budget_tokens"]
        if self._tokens >= self._next or done:
            self._evaluate(kwargs["model"])
        control.should_training_stop = done

    @torch.inference_mode()
    def _evaluate(self, model: Any) -> None:
        self._seconds += time.monotonic() - self._since
        model.eval()
        prompts = [problem["prompt"] for problem in self._spec["held_out"]]
        texts = [
            p
            if isinstance(p, str)
            else self._tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
            for p in prompts
        ]
        torch.manual_seed(0)
        rewards: list[list[float]] = []
        size = self._spec["held_out_batch"]
        for start in range(0, len(texts), size):
            inputs = self._tokenizer(
                texts[start : start + size],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
            )
            num = self._spec["rollouts_per_prompt"]
            output = model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self._spec["max_tokens"],
                num_return_sequences=num,
                pad_token_id=self._tokenizer.pad_token_id,
            )
            texts_sampled = self._tokenizer.batch_decode(
                output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for index, problem in enumerate(self._spec["held_out"][start : start + size]):
                rewards.append(
                    [exact(text, problem["answer"]) for text in texts_sampled[index * num : (index + 1) * num]]
                )
        model.train()
        line = {"tokens": self._tokens, "wall_s": self._seconds, "rewards": rewards}
        with Path(self._spec["output"]).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._next = self._tokens + self._spec["every_tokens"]
        self._since = time.monotonic()


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    watch = Watch(spec, tokenizer)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
        reward_funcs=watch.reward,
        args=GRPOConfig(
            output_dir=spec["folder"],
            learning_rate=spec["learning_rate"],
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=spec["warmup_steps"],
            per_device_train_batch_size=spec["rollouts_per_step"],
            max_completion_length=spec["max_tokens"],
            max_steps=10_000,
            shuffle_dataset=False,
            gradient_checkpointing=False,  # TRL's default would only slow it down here
            seed=spec["seed"],
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": p["prompt"], "answer": p["answer"]} for p in spec["training"]]),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.train()


if __name__ == "__main__":
    main()
