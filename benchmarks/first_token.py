"""How long a checkpoint takes to its first token, in a process of its own.

    python -m benchmarks.first_token MODEL

prints JSON: seconds for imports, for loading (the LLM), for the first token, and the peak memory.
The packed weights are kept in $XDG_CACHE_HOME, so that a fresh one means packing, and a second run
in it mapping.
"""

import json
import resource
import sys
import time

PROMPT = list(range(3, 19))


def main(model: str) -> None:
    started = time.monotonic()
    from engine.llm import LLM  # the import is measured
    from engine.sampling_params import SamplingParams

    imported = time.monotonic()
    llm = LLM(model, max_num_seqs=4, session_len=1024)
    loaded = time.monotonic()
    llm.generate([PROMPT], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
    found = {
        "imports": imported - started,
        "load": loaded - imported,
        "first token": time.monotonic() - loaded,
        "peak memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
