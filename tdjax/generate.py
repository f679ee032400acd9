"""`python -m tdjax.generate`: arguments to a pipeline call to files. jax is imported after everything cheap is checked."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import secrets
import sys
from pathlib import Path

from tdjax.arguments import OFFICIAL_MODELS, Job, parse, read_jobs
from tdjax.config import PRESETS, SamplerConfig, SLAConfig, VideoSize
from tdjax.errors import CheckpointError, TdjaxError, UsageError
from tdjax.resolution import choose_size

DEFAULT_PATH = "output/{model}_{seed}_{index}.mp4"
FIELDS = ("model", "seed", "index", "prompt_slug", "date")


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage, 3 checkpoint, 4 out of memory, 5 not finite, 130 interrupted."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        check_early(args)
        return run(args)
    except TdjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was left half-written; the same command starts again", file=sys.stderr)
        return 130


def check_early(args) -> None:
    """Whatever can be wrong without knowing the model, found in milliseconds."""
    if args.num_frames is not None:
        VideoSize(frames=args.num_frames)
    for name in ("width", "height"):
        if getattr(args, name) is not None:
            VideoSize(**{name: getattr(args, name)})
    image = (16, 9) if args.image_path else None  # its real size is checked when it is read
    choose_size(resolution=args.resolution, aspect_ratio=args.aspect_ratio, width=args.width, height=args.height, image_size=image)
    if args.sla_topk is not None:
        SLAConfig(topk=args.sla_topk)
    known = PRESETS[args.model.lower()].sampler if args.model.lower() in PRESETS else SamplerConfig()
    if args.sampler in ("sde", "ode") or (args.sampler is None and known.few_step and not local_files(args)):
        steps = len(args.mid_t) + 1 if args.mid_t and args.num_steps is None else args.num_steps
        changes = {"steps": steps, "sigma_max": args.sigma_max, "mid": args.mid_t and tuple(args.mid_t)}
        SamplerConfig(**{name: value for name, value in changes.items() if value is not None})
    if args.num_samples < 1:
        raise UsageError(f"--num_samples is {args.num_samples}", "at least one video is made", "use 1")
    for path in (args.image_path, args.latents, args.prompt_embeds, args.prompt_file):
        if path and not Path(path).is_file():
            raise UsageError(f"{path} does not exist", "it was given on the command line", near_files(Path(path)))
    template = args.save_path or DEFAULT_PATH
    try:
        template.format(**dict.fromkeys(FIELDS, "x"))
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f"--save_path {template}: unknown field {error}", f"fields are {', '.join(FIELDS)}") from error
    if args.save_path and not args.prompt_file and not args.overwrite and "{" not in args.save_path and Path(args.save_path).exists():
        raise UsageError(f"{args.save_path} exists", "nothing is overwritten by itself", "give another name, or --overwrite")


def not_downloaded(args) -> bool:
    """Whether a preset's files would have to be fetched first."""
    from tdjax.locate import locate

    if args.model.lower() not in PRESETS or local_files(args):
        return False
    try:
        locate(args.model, revision=args.revision, offline=True)
    except CheckpointError:
        return True
    return False


def local_files(args) -> bool:
    """Whether the weights' kind (distilled or not) is known only once they are opened."""
    return Path(args.model).exists() or any(getattr(args, name) for name in PATHS)


def near_files(path: Path) -> str:
    import difflib

    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 3)
    return f"in {folder} there is: {', '.join(near)}" if near else "check the path"


def run(args) -> int:
    cache_note = set_compile_cache(args)
    import tdjax
    from tdjax.locate import Located
    from tdjax.parts import planned_parts
    from tdjax.pipeline import Pipeline
    from tdjax.precision import Policy
    from tdjax.stages import Stages
    from tdjax.video import check_target

    show = False if args.quiet else True if args.verbose else None
    stages = Stages(show)
    if cache_note:
        stages.note(cache_note)
    if args.dry_run and not_downloaded(args):
        preset = PRESETS[args.model.lower()]
        located = Located(name=args.model.lower(), layout="published", preset=args.model.lower(), distilled=preset.distilled)
        pipe = Pipeline(located, planned_parts(preset, Policy()), mesh=None, low_memory=args.low_memory, stages=stages)
        stages.note(f"{args.model} is not downloaded: this plan comes from its preset")
        return dry_run(args, pipe, read_jobs(args, "dry run"))
    pipe = tdjax.load(
        args.model,
        attention=args.attention_type,
        attention_impl=args.attention_impl,
        quant=args.quant,
        dtype=args.dtype,
        vae_dtype=args.vae_dtype,
        sla_topk=args.sla_topk,
        mesh=args.mesh,
        low_memory=args.low_memory,
        text_encoder=not args.prompt_embeds,
        lora=lora_weights(args.lora),
        lora_high=lora_weights(args.lora_high),
        lora_low=lora_weights(args.lora_low),
        revision=args.revision,
        offline=args.offline,
        stages=stages,
        **{name: getattr(args, name) for name in PATHS},
    )
    check_model(args, pipe)
    if not pipe.trained:
        stages.note("the embedded demo model is UNTRAINED (random weights): it runs the whole path and draws noise, whatever the prompt")
    jobs = read_jobs(args, pipe.default_prompt)
    if args.seed < 0:
        seed = secrets.randbelow(2**31)
        stages.note(f"seed {seed}")
        jobs = [dataclasses.replace(job, seed=seed if job.seed < 0 else job.seed) for job in jobs]
    if args.serve:
        return serve(args, pipe)
    if not (args.warmup or args.dry_run and not jobs[0].prompt) and not jobs[0].prompt and not args.prompt_embeds:
        raise UsageError("no prompt", "this model needs one", 'give --prompt "..." (long English descriptions work best)')
    if args.dry_run:
        return dry_run(args, pipe, jobs)
    if args.warmup:
        pipe.warmup(**call_arguments(args, jobs[0]))
        return report(args, pipe)
    if args.save_prompt_embeds:
        from tdjax.embeds import save_embeds

        print(save_embeds(args.save_prompt_embeds, pipe.embed([job.prompt for job in jobs]), [job.prompt for job in jobs], args.overwrite))
        return report(args, pipe)
    for job in jobs:  # every row is checked before the first one runs
        pipe.request(job.prompt or "", **call_arguments(args, job))
        if args.format != "latents":
            check_target(output_path(args, pipe, job, 0), args.fps, args.crf, overwrite=True)
    return run_jobs(args, pipe, jobs)


PATHS = ("dit_path", "high_noise_model_path", "low_noise_model_path", "vae_path", "text_encoder_path", "tokenizer_path")
PASSED = ("negative_prompt", "fit", "resolution", "aspect_ratio", "width", "height", "num_steps", "sigma_max", "mid_t", "sampler",
          "boundary", "shift", "guidance_scale", "num_samples", "fps", "check")  # fmt: skip


def call_arguments(args, job: Job) -> dict:
    """The arguments of the pipeline's call; None means the model's default."""
    out = {name: getattr(args, name) for name in PASSED}
    out |= {"seed": job.seed, "image": job.image, "num_frames": job.num_frames}
    if args.latents:
        import numpy as np

        out["latents"] = np.load(args.latents)
    if args.prompt_embeds:
        from tdjax.embeds import load_embeds

        out["prompt_embeds"] = load_embeds(args.prompt_embeds)
    if args.format == "latents":
        out["output_type"] = "latent"
    return {k: v for k, v in out.items() if v is not None}


def run_jobs(args, pipe, jobs: list[Job]) -> int:
    """All prompts through the text encoder first, so that it is loaded once and gone before the transformer comes."""
    todo = []
    for job in jobs:
        path = output_path(args, pipe, job, 0)
        if args.prompt_file and path.exists() and not args.overwrite:
            pipe.stages.note(f"{path} is there already: skipped")
        else:
            todo.append(job)
    embeds = {}
    if len(todo) > 1 and not args.prompt_embeds:
        prompts = sorted({job.prompt for job in todo})
        embeds = dict(zip(prompts, pipe.embed(prompts), strict=True))
    for job in todo:
        arguments = call_arguments(args, job)
        if job.prompt in embeds:
            arguments["prompt_embeds"] = embeds[job.prompt][None]
        result = pipe(job.prompt or "", **arguments)
        write(args, pipe, job, result)
    if args.profile:
        import jax

        with jax.profiler.trace(args.profile):
            pipe(jobs[-1].prompt or "", **call_arguments(args, jobs[-1]))
    return report(args, pipe)


def write(args, pipe, job: Job, result) -> None:
    """One file a sample (or one tiled file); its path on stdout once it is complete."""
    if args.grid:
        result = tiled(result)
    for index in range(len(result)):
        path = output_path(args, pipe, job, index, len(result))
        if not (job.out or args.prompt_file or args.overwrite):
            path = unused(path)
        with pipe.stages("write"):
            result.save(path, index=index, crf=args.crf, metadata=args.metadata == "on", overwrite=args.overwrite)
        if args.json:
            print(json.dumps({"path": str(path), "seed": result.seed, "index": index, "timings": result.timings}), flush=True)
        else:
            print(path, flush=True)


def output_path(args, pipe, job: Job, index: int, count: int = 1) -> Path:
    template = job.out or args.save_path or DEFAULT_PATH
    slug = re.sub(r"[^a-z0-9]+", "-", (job.prompt or "embeds").lower()).strip("-")[:40]
    if args.prompt_file and template == DEFAULT_PATH:
        template = "output/{model}_{prompt_slug}_{seed}_{index}.mp4"
    fields = {"model": pipe.name, "seed": job.seed, "index": index, "prompt_slug": slug, "date": datetime.date.today().isoformat()}
    path = Path(template.format(**fields))
    if args.format:
        path = path.with_suffix({"png": "", "latents": ".safetensors"}.get(args.format, f".{args.format}"))
    if count > 1 and "{index}" not in template:
        path = path.with_stem(f"{path.stem}_{index}")
    return path


def unused(path: Path) -> Path:
    """The default name, or the next free one: demo_0_0.mp4, demo_0_0-2.mp4, ..."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


def tiled(result):
    """All samples side by side, as the official scripts write them."""
    from einops import rearrange

    columns = max(n for n in range(1, len(result) + 1) if len(result) % n == 0 and n * n <= len(result))
    frames = rearrange(result.frames, "(r c) t h w k -> 1 t (r h) (c w) k", c=len(result) // columns)
    return dataclasses.replace(result, frames=frames, latents=result.latents[:1])


def check_model(args, pipe) -> None:
    if args.task != "auto" and args.task != pipe.task:
        raise UsageError(
            f"--task {args.task}, but these are {pipe.task} weights",
            f"the patch embedding takes {pipe.config.in_channels} channels: text-to-video has 16, image-to-video 36",
            "leave --task away: it is read from the file",
        )
    if args.official_model:
        task, dim = OFFICIAL_MODELS[args.official_model.lower()]
        if (task, dim) != (pipe.task, pipe.config.dim):
            raise UsageError(
                f"--model {args.official_model}, but the file holds a {pipe.task} network of width {pipe.config.dim}",
                f"{args.official_model} is {task} of width {dim}",
                "leave --model away: it is read from the file",
            )
    if args.default_norm:
        pipe.stages.note("--default_norm: LayerNorm is always the true one here")


def dry_run(args, pipe, jobs: list[Job]) -> int:
    import numpy as np

    from tdjax import plan

    image = {"image": np.zeros((1080, 1920, 3), np.uint8)} if pipe.task == "i2v" and not jobs[0].image else {}
    request = pipe.request(jobs[0].prompt or "dry run", **(call_arguments(args, jobs[0]) | image))
    for line in pipe.warnings(request):
        pipe.stages.note(line)
    plans, limit = pipe.plan(request), plan.memory_limit()
    c = pipe.config
    lines = [
        f"model      {pipe.name} ({pipe.task}, {c.layers} layers of width {c.dim}), {c.policy.compute}",
        f"attention  {c.attention}" + ("" if c.attention == "dense" else f", topk {c.sla.topk}, blocks {c.sla.block_q}x{c.sla.block_k}"),
        f"linears    {c.linear}",
        f"size       {request.size}: {request.size.tokens(c.patch)} tokens",
        f"sampler    {request.sampler.mode}, {request.sampler.steps} steps, sigma_max {request.sampler.sigma_max:g}",
        f"weights    {'stay on the device' if pipe.keep(request) else 'freed after each stage'}",
        f"videos     {len(jobs) * args.num_samples}, first {output_path(args, pipe, jobs[0], 0)}",
        "",
        plan.table(plans, limit),
    ]
    if args.json:
        print(json.dumps({"plan": [dataclasses.asdict(p) for p in plans], "limit": limit, "tokens": request.size.tokens(c.patch)}))
    else:
        print("\n".join(lines))
    return 0


def serve(args, pipe) -> int:
    """One prompt a line; `:set NAME VALUE` changes an option of the call, `:quit` ends."""
    changes: dict = {}
    pipe.stages.note("serving: one prompt a line; ':set seed 3' changes an option; ':quit' ends")
    for line in sys.stdin:
        words = line.strip().split(None, 2)
        if not words:
            continue
        if words[0] == ":quit":
            break
        try:
            if words[0] == ":set" and len(words) == 3:
                changes[words[1]] = json.loads(words[2]) if re.fullmatch(r"[-\d.\[\], ]+", words[2]) else words[2]
                continue
            job = Job(
                prompt=line.strip(), seed=int(changes.get("seed", max(args.seed, 0))), image=args.image_path, num_frames=args.num_frames
            )
            result = pipe(job.prompt, **(call_arguments(args, job) | changes))
            write(args, pipe, job, result)
        except TdjaxError as error:  # a bad line must not end the session that holds the weights
            print(f"error: {error}", file=sys.stderr)
    return report(args, pipe)


def report(args, pipe) -> int:
    if args.timings:
        print(pipe.stages.table(), file=sys.stderr)
    return 0


def lora_weights(values: list[str]) -> tuple[tuple[str, float], ...]:
    """FILE or FILE:0.8"""
    out = []
    for value in values:
        path, colon, weight = value.rpartition(":")
        if colon and re.fullmatch(r"-?\d+(\.\d+)?", weight):
            out.append((path, float(weight)))
        else:
            out.append((value, 1.0))
    return tuple(out)


def set_compile_cache(args) -> str | None:
    """Persistent compile cache, on by default; a folder that cannot be written costs a line, not the run."""
    from tdjax.locate import cache_folder

    if args.compile_cache_dir == "none":
        return None
    folder = Path(args.compile_cache_dir) if args.compile_cache_dir else cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{secrets.token_hex(4)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"compile cache {folder} is not writable ({error.strerror}): going on without; --compile_cache_dir DIR chooses another"
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return None


if __name__ == "__main__":
    sys.exit(main())
