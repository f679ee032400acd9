"""Clips of the embedded model for prompts in free words and order, judged by the detector: every
factor that a prompt names, or that was drawn for it, must be in its clip.

    python docs/scripts/free_prompts.py [--count 200] [--file docs/scripts/thirty_prompts.txt]

The file has thirty as people write them: twelve like captions of its training, ten of odd order or
sense, eight of words that it has never seen.
"""

import argparse
from pathlib import Path

import numpy as np

import tdjax
from tdjax.media.scenes import detector
from tdjax.text.language import caption_of
from tdjax.train.tiny.data.captions import LANGUAGE, free_prompt, parse

AT_ONCE = 16


def main() -> None:
    """Prints the prompts that failed, with what was told of them, and the share that is right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--file", type=Path, help="one prompt a line, in place of drawn ones")
    args = parser.parse_args()
    prompts = [free_prompt(seed) for seed in range(args.count)]
    if args.file:
        prompts = [line for line in args.file.read_text().splitlines() if line.strip()]
    pipe, right, told = tdjax.load("demo", progress=False), [], []
    for begin in range(0, len(prompts), AT_ONCE):
        group = prompts[begin : begin + AT_ONCE]
        seeds = list(range(begin, begin + len(group)))
        results = [pipe(p, seed=s) for p, s in zip(group, seeds, strict=True)]
        told += [result.warnings for result in results]
        clips = np.concatenate([result.frames for result in results])
        wanted = parse([caption_of(LANGUAGE, prompt) for prompt in group])
        found = detector.correct(detector.measure(clips), wanted)
        right += np.stack(list(found.values())).all(0).tolist()
    silent = 0
    for prompt, good, notes in zip(prompts, right, told, strict=True):
        silent += not good and not notes
        if not good:
            print(f"wrong: {prompt!r} ({'; '.join(notes) or 'nothing told'})")
    print(f"{sum(right)} of {len(right)} right, {np.mean(right):.1%}; {silent} wrong in silence")


if __name__ == "__main__":
    main()
