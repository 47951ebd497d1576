"""Turn SciTLDR (allenai/scitldr, SciTLDR-A) into the schema of task smoltldr: abstracts and one-sentence summaries.

python results/scitldr.py SOURCE OUT    # SOURCE holds train.jsonl and test.jsonl, as published
"""

import json
import sys
from pathlib import Path

LONGEST = 1000  # characters of an abstract, about 220 tokens: so that a laptop gets through


def main(source: str, out: str) -> None:
    Path(out).mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "test.jsonl"):
        lines = (Path(source) / name).read_text(encoding="utf-8").splitlines()
        records = [(" ".join(record["source"]).strip(), record["target"][0]) for record in map(json.loads, lines)]
        kept = [
            {"prompt": f"{abstract}\n\nSummarize this paper in one sentence.", "completion": f" {summary.strip()}"}
            for abstract, summary in records
            if len(abstract) <= LONGEST
        ]
        (Path(out) / name).write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        print(f"{name}: {len(kept)} of {len(records)} abstracts have at most {LONGEST} characters")


if __name__ == "__main__":
    main(*sys.argv[1:])
