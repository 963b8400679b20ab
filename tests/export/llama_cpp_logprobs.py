"""Run by `test_llama_cpp.py` with the Python that has xllamacpp: what llama.cpp says comes next.

usage: llama_cpp_logprobs.py MODEL.gguf ADAPTER.gguf|- IDS_JSON VOCABULARY; the last line printed is {token id: logprob}.
"""

from __future__ import annotations

import json
import sys

import xllamacpp


def main(model: str, adapter: str, ids: str, vocabulary: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cpuparams.n_threads = 1
    # Keys and values in 16 bits and the fused attention would cost three digits.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter != "-":
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    request = {"prompt": json.loads(ids), "n_predict": 1, "n_probs": int(vocabulary), "temperature": 0.0}
    answer = xllamacpp.Server(params).handle_completions(request)
    told = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    print(json.dumps({token["id"]: token["logprob"] for token in told}))


if __name__ == "__main__":
    main(*sys.argv[1:])
