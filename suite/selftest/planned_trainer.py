"""A trainer that updates a vLLM engine through vLLM's own API with the backend `planned`: MODEL PORT WEIGHTS ..."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

from safetensors.torch import load_file
from vllm import LLM, SamplingParams

from extensions import manifest_of
from extensions.planned import PlannedSender

ENGINE = {"dtype": "bfloat16", "max_model_len": 256, "enforce_eager": True, "kv_cache_memory_bytes": 2**26}
COLUMNS = {"names": "name", "dtype_names": "dtype", "shapes": "shape"}


def main(model: str, port: str, *paths: str) -> None:
    llm = LLM(model, weight_transfer_config={"backend": "planned"}, skip_tokenizer_init=True, **ENGINE)
    group = {"master_address": "127.0.0.1", "master_port": int(port), "world_size": 2}
    print_answer(llm)
    with ThreadPoolExecutor() as aside:
        joining = aside.submit(llm.init_weight_transfer_engine, {"init_info": group | {"rank_offset": 1}})
        sender = PlannedSender(**group, device="cpu")
        joining.result()
        for path in paths:
            weights = load_file(path)
            manifest = manifest_of(weights.items())
            update = {column: [entry[key] for entry in manifest] for column, key in COLUMNS.items()}
            llm.start_weight_update()
            updating = aside.submit(llm.update_weights, {"update_info": update})
            sender.send(weights.items(), manifest)
            updating.result()
            llm.finish_weight_update()
            llm.reset_prefix_cache()
            print_answer(llm)


def print_answer(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    found = llm.generate([{"prompt_token_ids": [1, 2, 3]}], greedy, use_tqdm=False)
    print("ANSWER", json.dumps([*found[0].outputs[0].token_ids]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
