r"""MM-UPT on GeoQA by TRL's trainer, over nodes: LoRA, DeepSpeed ZeRO-2, samples from a vLLM server.

On a node with 8 GPUs that samples, and on each of two that train, R being 0 on the first and 1 on the other:

    pip install "trl[vllm]==1.16.0" "vllm>=0.30" deepspeed torchvision -r requirements.txt
    bash examples/trl_multinode/serve.sh
    accelerate launch --config_file examples/trl_multinode/accelerate.yaml \
        --machine_rank R --main_process_ip FIRST --main_process_port 29500 \
        examples/trl_multinode/train.py --vllm_server_host SAMPLER

Every flag of GRPOConfig can be given; without one it is as below. README.md has what differs from train_upt.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
from peft import LoraConfig
from transformers import AutoProcessor, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from upt import data, prompts
from upt.errors import DataError, UserError
from upt.model import TARGETS
from upt.model.families import Qwen
from upt.trl import label_free

RECIPE = {  # of 2505.22453, as in --preset mm-upt: 512 questions x 10 responses a step, in 4 updates, on 16 GPUs
    "num_generations": 10,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 20,
    "steps_per_generation": 80,
    "max_steps": 240,
    "max_completion_length": 2048,
    "temperature": 0.7,
    "top_p": 0.99,
    "epsilon": 0.2,
    "epsilon_high": 0.3,
    "delta": 3.0,
    "beta": 0.01,
    "use_bias_correction_kl": False,
    "vllm_importance_sampling_correction": False,
    "learning_rate": 1e-5,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 3,
}
ENGINE = {"bf16": True, "gradient_checkpointing": True, "use_vllm": True, "vllm_mode": "server"}
ENGINE |= {"model_init_kwargs": {"dtype": "bfloat16"}}
FILES = {"output_dir": "runs/trl", "logging_steps": 1, "save_steps": 40, "remove_unused_columns": False}


@dataclass
class Script:
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    data: str = "geoqa"
    reward: str = "majority"
    prompt: str = "boxed"
    min_pixels: int = 262144  # the server's are in serve.sh
    max_pixels: int = 1204224
    lora_rank: int = 64


def dataset_of(script: Script, processor) -> datasets.Dataset:
    """The questions as TRL takes them. All are looked at once; later a picture is opened when its question is asked.

    Raises DataError for a question without a picture, since TRL's batches have one with each, and for weights.
    """
    questions, template = data.load(script.data, "train"), prompts.template(script.prompt)
    if questions.weights:
        raise DataError(f"--data {script.data}: TRL draws all questions alike; leave the weights out")
    good = []
    for i in range(len(questions)):
        for question in questions.get([i]):
            if question.image is None:
                raise DataError(
                    f"--data {script.data}: {question.uid} has no picture; give questions that all have one"
                )
            good.append(i)
    if questions.bad:
        print(questions.report_bad())
    special = [*processor.tokenizer.all_special_tokens, processor.image_token, processor.video_token]

    def rows(batch: dict) -> dict:
        found = [questions[i] for i in batch["row"]]
        texts = [prompts.without(prompts.with_options(q.question, q.choices), special) for q in found]
        return {
            "prompt": [[{"role": "user", "content": template.replace("{question}", text)}] for text in texts],
            "image": [question.image for question in found],
            "choices": [question.choices for question in found],
        }

    return datasets.Dataset.from_dict({"row": good}).with_transform(rows)


def main() -> None:
    parser = HfArgumentParser((Script, GRPOConfig))
    parser.set_defaults(**RECIPE, **ENGINE, **FILES)
    script, config = parser.parse_args_into_dataclasses()
    processor = AutoProcessor.from_pretrained(script.model)
    processor.image_processor.size = {"shortest_edge": script.min_pixels, "longest_edge": script.max_pixels}
    # By pattern: the vision tower has layers of these names, too.
    lora = LoraConfig(r=script.lora_rank, lora_alpha=2 * script.lora_rank, target_modules=Qwen.targeted(TARGETS))
    reward = label_free(script.reward, group_size=config.num_generations, seed=config.seed)
    questions = dataset_of(script, processor)
    trainer = GRPOTrainer(script.model, [reward], config, questions, processing_class=processor, peft_config=lora)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
