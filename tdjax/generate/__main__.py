"""`tdjax generate`: arguments to a pipeline call to files. jax is imported after
everything cheap is checked."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tdjax import cli

if __name__ == "__main__":
    cli.heed_signals()

from tdjax.checkpoints.locate import PATHS
from tdjax.config import SamplerConfig, SLAConfig, VideoSize, check_fps, check_samples
from tdjax.errors import CheckpointError, NotFinite, TdjaxError, UsageError
from tdjax.files import near_files, refuse_existing, refuse_inputs, refuse_unwritable
from tdjax.generate import outputs
from tdjax.generate.arguments import INSTEAD, OFFICIAL_MODELS, build_parser, parse
from tdjax.generate.jobs import Job, drawn_seed, read_jobs, standard_input, with_seed
from tdjax.media.resolution import choose_size
from tdjax.pipeline.options import PipelineOptions
from tdjax.presets import PRESETS
from tdjax.progress import Bar, Stages, say
from tdjax.text.characters import repaired
from tdjax.text.language import understood

GROUP = 64  # rows of a prompt file that are encoded together
# Arguments of the library that the command calls otherwise.
NAMES = {
    "image": "image_path",
    "attention": "attention_type",
    "impl": "attention_impl",
    "compile_cache": "compile_cache_dir",
}


LORAS = ("lora", "lora_high", "lora_low")
# What a command does by itself, on its own device.
ALONE = ("dry_run", "warmup", "profile", "timings", "save_prompt_embeds")
# Options that a session cannot change: how the model is opened, and what is made beside its lines.
BEFORE = {
    *("model", "revision", "offline", "task", "attention_type", "attention_impl", "quant", "dtype"),
    *("vae_dtype", "sla_topk", "mesh", "low_memory", "text_encoder_device", "transformer_device"),
    *("vae", "prompt_cache"),
    *("compile_cache_dir", "config", "serve", "dry_run", "warmup", "profile", "ray", "ray_gpus"),
    *("coordinator", "processes", "process_id"),
    *("prompt", "prompt_file", "prompt_embeds", "save_prompt_embeds"),
    *PATHS,
}


class Told:
    """What a command's stages have beside what they show: notes, which the library writes, speak of
    options, and there are none with -q."""

    quiet = False

    def tell(self, text: str) -> None:
        if not self.quiet:
            super().tell(_spelled(text))  # type: ignore[misc]


class Lines(Told, Stages):
    """A line for each stage, as a log file wants it."""


class OneBar(Told, Bar):
    """A bar over all that the command makes."""


def command_stages(quiet: bool, verbose: bool) -> Stages:
    """A bar on a terminal, lines elsewhere where they were asked for, nothing with -q."""
    terminal = sys.stderr.isatty()
    stages = OneBar(not quiet) if terminal and not verbose else Lines(verbose and not quiet)
    stages.quiet = quiet
    return stages


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 ok, 2 usage, 3 checkpoint, 4 out of memory, 5 not finite, 130 interrupted, 143
    terminated."""
    return cli.main(_command, argv, parser=build_parser, names=NAMES)


def _command(argv: list[str]) -> int:
    args = parse(argv)
    if several(args):
        from tdjax.generate import together

        return together.run(args)
    check_early(args)
    return run(args, command_stages(args.quiet, args.verbose))


def several(args) -> bool:
    """Whether this process is one of several that make each video together: it was told so, or a
    launcher has started them and a mesh is asked for."""
    if any(value is not None for value in (args.coordinator, args.processes, args.process_id)):
        return True
    if not args.mesh:  # each makes its own
        return False
    from tdjax.parallel import hosts

    return hosts.launcher() is not None


def check_early(args) -> None:
    """Whatever can be wrong without knowing the model, found in milliseconds."""
    if args.num_frames is not None:
        VideoSize(frames=args.num_frames)
    for name in ("width", "height"):
        if getattr(args, name) is not None:
            VideoSize(**{name: getattr(args, name)})
    image = (16, 9) if args.image_path else None  # its real size is checked when it is read
    choose_size(
        resolution=args.resolution,
        aspect_ratio=args.aspect_ratio,
        width=args.width,
        height=args.height,
        image_size=image,
    )
    if args.sla_topk is not None:
        SLAConfig(topk=args.sla_topk)
    preset = PRESETS.get(args.model.lower())
    known = preset.sampler if preset else SamplerConfig()
    few_step = args.sampler is None and known.few_step and not _local_files(args)
    if args.sampler in ("sde", "ode") or few_step:
        steps = len(args.mid_t) + 1 if args.mid_t and args.num_steps is None else args.num_steps
        changes = {
            "num_steps": steps,
            "sigma_max": args.sigma_max,
            "mid_t": args.mid_t and tuple(args.mid_t),
            "boundary": args.boundary,
        }
        SamplerConfig(**{name: value for name, value in changes.items() if value is not None})
    check_samples(args.num_samples)
    check_fps(args.fps)
    if args.upscale is not None and not 1 <= args.upscale <= 64:
        raise UsageError(f"--upscale is {args.upscale}", "it is a number from 1 to 64", "use 1")
    _check_inputs(args)
    settle_format(args)
    if args.grid and args.format == "latents":
        raise UsageError("--grid with latents", "a grid is made of pixels", "leave --grid away")
    outputs.check_early(args)
    if args.save_prompt_embeds:
        refuse_inputs(Path(args.save_prompt_embeds), outputs.inputs(args, args.image_path))
        refuse_existing(Path(args.save_prompt_embeds), args.overwrite)
        refuse_unwritable(Path(args.save_prompt_embeds))
    if args.profile:
        refuse_unwritable(Path(args.profile) / "trace")
    if args.ray is not None:
        _check_ray(args)


def settle_format(args) -> None:
    """Latents are what a name of theirs asks for."""
    if args.save_path and args.save_path.endswith(".safetensors") and args.format is None:
        args.format = "latents"


def _check_ray(args) -> None:
    """Raises UsageError where --ray has no rows to divide, or cannot."""
    for name in ALONE:
        if getattr(args, name):
            raise UsageError(
                f"--ray beside --{name}",
                "processes of a Ray cluster make rows of a prompt file, and nothing else",
                "leave one of them away",
            )
    if not args.prompt_file:
        raise UsageError(
            "--ray without --prompt_file",
            "a Ray cluster divides the rows of a file",
            "give --prompt_file FILE",
        )
    if args.ray < 1 or args.ray_gpus < 0:
        raise UsageError(
            f"--ray {args.ray} --ray_gpus {args.ray_gpus}",
            "1 process or more is needed, each with 0 GPUs or more",
            "for example --ray 8 --ray_gpus 1",
        )
    if importlib.util.find_spec("ray") is None:
        raise UsageError(
            "ray is not installed",
            "--ray divides rows by it",
            'pip install "tdjax[ray]", or pip install -e ".[ray]" in a checkout',
        )


def _check_inputs(args) -> None:
    """Raises UsageError for inputs that are not there, or contradict each other."""
    for path in (args.latents, args.prompt_embeds):
        if path and not Path(path).is_file():
            raise _absent(path)
    for path in (args.image_path, args.prompt_file):  # pipes will do; an address is told later
        plain = path and path != "-" and "://" not in path
        if plain and (not Path(path).exists() or Path(path).is_dir()):
            raise _absent(path)
    if args.serve and (args.prompt or args.prompt_file):
        raise UsageError(
            "--serve beside a prompt", "prompts are read from standard input", "give one of them"
        )
    if args.prompt_embeds and args.save_prompt_embeds:
        raise UsageError(
            "--save_prompt_embeds beside --prompt_embeds",
            "there is nothing to encode",
            "give a prompt, or copy the file",
        )
    if args.prompt_embeds and (args.prompt or args.prompt_file or args.serve):
        raise UsageError(
            "--prompt_embeds beside a prompt", "the embeddings are the prompt", "give one of them"
        )


def _absent(path: str) -> UsageError:
    what = "is a folder" if Path(path).is_dir() else "does not exist"
    return UsageError(f"{path} {what}", "it was given on the command line", near_files(Path(path)))


def _not_downloaded(args) -> bool:
    """Whether a preset's files would have to be fetched first."""
    from tdjax.checkpoints.locate import locate

    if args.model.lower() not in PRESETS or _local_files(args):
        return False
    try:
        locate(args.model, revision=args.revision, offline=True)
    except CheckpointError:
        return True
    return False


def _local_files(args) -> bool:
    """Whether the weights' kind (distilled or not) is known only once they are opened."""
    return Path(args.model).exists() or any(getattr(args, name) for name in PATHS)


def run(args, stages: Stages) -> int:
    """Opens the model and does what the command asks for; the exit code. Of several processes the
    first decides, writes and speaks."""
    if args.ray is not None:
        from tdjax.generate import ray

        return ray.run(args)
    from tdjax.generate import together

    options = together.every(lambda: start(args, stages))
    together.share_cache(stages.note)
    if args.dry_run and together.decided(lambda: _not_downloaded(args)):
        from tdjax.pipeline.load import plan_pipeline

        pipe = together.every(lambda: plan_pipeline(args.model.lower(), options, stages=stages))
        together.every(lambda: _check_model(args, pipe))
        stages.note(f"{args.model} is not downloaded: this plan comes from its preset")
        return together.decided(
            lambda: dry_run(args, pipe, read_jobs(args, "dry run", stages.note))
        )
    pipe = together.every(lambda: open_model(args, stages, options))
    if args.model == "demo" and not any(getattr(args, name) for name in PATHS):
        stages.note(f"the embedded demo model, {pipe.size}; --model gives another")
    jobs = together.jobs(lambda: _jobs(args, pipe))
    if args.serve:
        return serve(args, pipe)
    if args.dry_run:
        return together.decided(lambda: dry_run(args, pipe, jobs))
    if args.warmup:
        pipe.warmup(**_call_arguments(args, jobs[0]))
        return _report(args, pipe)
    if args.save_prompt_embeds:
        from tdjax.text.embeds import save_embeds

        prompts = [job.prompt for job in jobs]
        embeds, path = pipe.embed(prompts), args.save_prompt_embeds
        save = lambda: save_embeds(path, embeds, prompts, args.overwrite)
        together.decided(lambda: print(save()))
        return _report(args, pipe)
    return _run_jobs(args, pipe, together.tasks(lambda: assigned(args, pipe, jobs, stages.note)))


def _jobs(args, pipe) -> list[Job]:
    """What the command has to make. Raises UsageError where there is no prompt."""
    note = pipe.stages.note
    jobs = read_jobs(args, pipe.default_prompt(drawn_seed()), note)
    if args.prompt is None and jobs[0].prompt and not args.prompt_file and not args.serve:
        note(
            f'no prompt was given, this one is drawn: --prompt "{jobs[0].prompt}" --seed'
            f" {jobs[0].seed}"
        )
    needed = not (args.prompt_embeds or args.serve or args.dry_run or args.warmup)
    if needed and not jobs[0].prompt:
        raise UsageError(
            "no prompt",
            "this model needs one",
            'give --prompt "..." (long English descriptions work best)',
        )
    return jobs


def start(args, stages: Stages, *, makes: bool = True) -> PipelineOptions:
    """Starts the device; how the model is opened on it. makes: whether it will be computed with."""
    cache_note = cli.set_compile_cache(args.compile_cache_dir)
    if cache_note:
        stages.note(cache_note)
    with stages("start device"):
        cli.start_jax(stages.note)
        if makes and not args.dry_run:
            cli.take_memory()
        text_device = text_encoder_device(args)
    return pipeline_options(
        args,
        text_device,
        text_encoder=not args.prompt_embeds,
        prompt_cache=args.prompt_cache == "on",
    )


def open_model(args, stages: Stages, options: PipelineOptions):
    """The pipeline of the command's model, which is the one that the command says it is."""
    from tdjax.pipeline.load import open_pipeline

    pipe = open_pipeline(
        args.model,
        options,
        {name: getattr(args, name) for name in PATHS},
        revision=args.revision,
        offline=args.offline,
        stages=stages,
    )
    _check_model(args, pipe)
    return pipe


def assigned(args, pipe, jobs: list[Job], note: Callable[[str], None]) -> list[outputs.Task]:
    """What is to be made, once every row can run. Raises UsageError."""
    _check_rows(args, pipe, jobs)
    return outputs.assign(args, pipe.name, jobs, note, lambda job: asked(args, pipe, job))


def _check_rows(args, pipe, jobs: list[Job]) -> None:
    """Raises UsageError for a row that cannot run, before the first one does."""
    for job in jobs:
        try:
            request = pipe.request(job.prompt, **_call_arguments(args, job))
        except TdjaxError as error:
            error.args = (f"row {job.row}: {error}" if args.prompt_file else str(error),)
            raise
        prompts = request.videos // request.num_samples
        if args.prompt_embeds and prompts != 1:
            raise UsageError(
                f"--prompt_embeds {args.prompt_embeds} holds {prompts} prompts",
                "a command makes the videos of one",
                "save them one by one, or give them to a pipeline in Python",
            )


def pipeline_options(
    args, text_device: str, *, text_encoder: bool = True, prompt_cache: bool = True
) -> PipelineOptions:
    """How the options of `add_model_options` and `add_speed_options` have a model opened."""
    return PipelineOptions(
        attention=args.attention_type,
        impl=args.attention_impl,
        quant=args.quant,
        dtype=args.dtype,
        vae_dtype=args.vae_dtype,
        sla_topk=args.sla_topk,
        mesh=args.mesh,
        low_memory=args.low_memory,
        text_encoder=text_encoder,
        text_encoder_device=text_device,
        transformer_device=args.transformer_device,
        vae=args.vae,
        prompt_cache=prompt_cache,
        lora=tuple(map(cli.lora_pair, args.lora)),
        lora_high=tuple(map(cli.lora_pair, args.lora_high)),
        lora_low=tuple(map(cli.lora_pair, args.lora_low)),
    )


PASSED = (
    "negative_prompt",
    "fit",
    "resolution",
    "aspect_ratio",
    "width",
    "height",
    "num_steps",
    "sigma_max",
    "mid_t",
    "sampler",
    "boundary",
    "shift",
    "guidance_scale",
    "num_samples",
    "fps",
    "check",
)


def _call_arguments(args, job: Job) -> dict:
    """The arguments of the pipeline's call; None means the model's default."""
    out = {name: getattr(args, name) for name in PASSED}
    out |= {"seed": job.seed, "image": job.image, "num_frames": job.num_frames}
    if args.latents:
        from tdjax.text.embeds import load_latents

        out["latents"] = load_latents(args.latents)
    if args.prompt_embeds:
        from tdjax.text.embeds import load_embeds

        out["prompt_embeds"] = load_embeds(args.prompt_embeds)
    if args.format == "latents":
        out["output_type"] = "latent"
    if args.preview:  # planned and compiled for; where videos are made, a function takes its place
        out["on_preview"] = lambda step, frames: None
    return {k: v for k, v in out.items() if v is not None}


def _facts(args, pipe, job: Job) -> dict[str, Any]:
    """What the metadata of a job's videos says, but for their timings."""
    return pipe.metadata(pipe.request(job.prompt, **_call_arguments(args, job)))


def asked(args, pipe, job: Job) -> dict[str, Any]:
    """The same without a seed that was drawn, so that it does not tell whether a row is done."""
    facts = _facts(args, pipe, job)
    return {key: value for key, value in facts.items() if key != "seed" or not job.drawn}


def _run_jobs(args, pipe, todo: list[outputs.Task]) -> int:
    """Prompts go through the text encoder a group at a time, so that it is loaded once for them and
    gone before the transformer comes; how many rows there are costs no memory."""
    if todo:
        sampler = pipe.request("", **_call_arguments(args, todo[0].job)).sampler
        pipe.stages.expect(len(todo) * args.num_samples, sampler.num_steps)
    for begin in range(0, len(todo), GROUP):
        group = todo[begin : begin + GROUP]
        embeds = encoded(args, pipe, group)
        many = 1 if args.latents else pipe.programs.copies // args.num_samples
        for tasks in side_by_side(group, many):
            _make(args, pipe, tasks, embeds)
    pipe.stages.close()
    if args.profile and todo:
        import jax

        from tdjax.parallel import hosts

        with jax.profiler.trace(args.profile) if hosts.first() else contextlib.nullcontext():
            pipe(todo[-1].job.prompt, **_call_arguments(args, todo[-1].job))
    return _report(args, pipe)


def side_by_side(tasks: list[outputs.Task], many: int) -> Iterator[list[outputs.Task]]:
    """Rows that copies of the weights make at the same time, up to `many` of them: those that
    follow each other and differ in prompt and seed alone."""
    for _, alike in itertools.groupby(tasks, lambda task: (task.job.image, task.job.num_frames)):
        rows = list(alike)
        for begin in range(0, len(rows), max(1, many)):
            yield rows[begin : begin + max(1, many)]


def encoded(args, pipe, group: list[outputs.Task]) -> dict[str, Any]:
    """{prompt: its embeddings [1 s d]} of a group of rows; nothing where a call makes its own."""
    if len(group) == 1 or args.prompt_embeds:
        return {}
    prompts = sorted({task.job.prompt for task in group})
    return {prompt: row[None] for prompt, row in zip(prompts, pipe.embed(prompts), strict=True)}


def text_encoder_device(args) -> str:
    """A command that ends after its videos reads the text encoder once: by streaming it, it gives
    the device's memory to the rest."""
    import jax

    once = not args.serve and not args.mesh and jax.default_backend() != "cpu"
    return "stream" if args.text_encoder_device == "auto" and once else args.text_encoder_device


def _make(args, pipe, tasks: list[outputs.Task], embeds: dict[str, Any]) -> None:
    """Jobs from prompts to complete files, but those that another process makes. embeds: see
    `encoded`, or nothing."""
    from tdjax.generate import together

    with contextlib.ExitStack() as held:
        claimed = lambda task: held.enter_context(together.claimed(args, task, pipe.stages.note))
        found = [(task, claimed(task)) for task in tasks]
        own = [dataclasses.replace(task, paths=paths) for task, paths in found if paths is not None]
        try:
            if own:
                make_files(args, pipe, own, embeds)
        except NotFinite:
            if len(own) == 1:
                raise
            for task in own:  # one by one up to that which is not finite: what is before it is kept
                make_files(args, pipe, [task], embeds)


def make_files(args, pipe, tasks: list[outputs.Task], embeds: dict[str, Any]) -> None:
    """Jobs of one call, which differ in prompt and seed alone, from prompts to complete files.
    embeds: the same."""
    import numpy as np

    from tdjax.generate import together

    jobs = [task.job for task in tasks]
    prompts, arguments = [job.prompt for job in jobs], _call_arguments(args, jobs[0])
    if embeds:
        rows = [row for prompt in prompts for row in embeds[prompt]]
        arguments["prompt_embeds"] = np.stack(rows)
    if pipe.info.language:
        for prompt in filter(None, prompts):
            pipe.stages.note(understood(pipe.info.language, prompt))
    if len(jobs) == 1:
        (prompts,) = prompts
    else:
        arguments["seed"] = [job.seed for job in jobs]
    demo = pipe.info.language is not None
    with contextlib.ExitStack() as open_files:
        made = [
            open_files.enter_context(
                outputs.Files(
                    args,
                    pipe.stages,
                    task.paths,
                    _facts(args, pipe, task.job),
                    overwrite=task.overwrite,
                    demo=demo,
                )
            )
            for task in tasks
        ]
        result = pipe(prompts, **(arguments | together.listening(made)))
        for each, one in zip(made, outputs.divided(result, made), strict=True):
            together.finish(each, one)


def _check_model(args, pipe) -> None:
    if args.task != "auto" and args.task != pipe.task:
        raise UsageError(
            f"--task {args.task}, but these are {pipe.task} weights",
            f"the patch embedding takes {pipe.config.in_channels} channels: text-to-video has 16,"
            " image-to-video 36",
            "leave --task away: it is read from the file",
        )
    if args.official_model:
        task, dim = OFFICIAL_MODELS[args.official_model.lower()]
        if (task, dim) != (pipe.task, pipe.config.dim):
            raise UsageError(
                f"--model {args.official_model}, but the file holds a {pipe.task} network of width"
                f" {pipe.config.dim}",
                f"{args.official_model} is {task} of width {dim}",
                "leave --model away: it is read from the file",
            )
    if args.default_norm:
        pipe.stages.note("--default_norm: LayerNorm is always the true one here")


def dry_run(args, pipe, jobs: list[Job]) -> int:
    """Prints what would be made and the memory of each stage; loads nothing."""
    import numpy as np

    whole = [job for job in jobs if job.prompt and (job.image or pipe.task == "t2v")]
    _check_rows(args, pipe, whole)
    image = (
        {"image": np.zeros((1080, 1920, 3), np.uint8)}
        if pipe.task == "i2v" and not jobs[0].image
        else {}
    )
    request = pipe.request(jobs[0].prompt or "dry run", **(_call_arguments(args, jobs[0]) | image))
    for line in pipe.warnings(request):
        pipe.stages.note(line)
    plan, c = pipe.plan(request), pipe.config
    lines = [
        (
            f"model      {pipe.name} ({pipe.task}, {c.layers} layers of width {c.dim}),"
            f" {c.policy.compute}"
        ),
        f"attention  {c.attention}"
        + (
            ""
            if c.attention == "dense"
            else f", topk {c.sla.topk}, blocks {c.sla.block_q}x{c.sla.block_k}"
        ),
        f"linears    {c.linear}",
        f"size       {request.size}: {request.size.tokens(c.patch)} tokens",
        (
            f"sampler    {request.sampler.sampler}, {request.sampler.num_steps} steps, sigma_max"
            f" {request.sampler.sigma_max:g}"
        ),
        f"weights    {'stay on the device' if plan.keep_resident else 'freed after each stage'}"
        + (", blocks of the transformer in the host's memory" if plan.stream_transformer else ""),
        (
            f"videos     {len(jobs) * args.num_samples}, first"
            f" {outputs.targets(args, pipe.name, jobs[0])[0]}"
        ),
        "",
        plan.table(),
    ]
    if args.json:
        print(
            json.dumps(
                {
                    "plan": [
                        {
                            "name": stage.name,
                            "weights": stage.weights,
                            "working": stage.working,
                            "host": stage.host,
                        }
                        for stage in plan.stages
                    ],
                    "limit": plan.limit,
                    "tokens": request.size.tokens(c.patch),
                }
            )
        )
    else:
        print("\n".join(lines))
    return 0


def serve(args, pipe) -> int:
    """One prompt a line; `:set OPTION VALUE` changes an option of the command, `:quit` ends."""
    pipe.stages.note("serving: one prompt a line; ':set seed 3' changes an option; ':quit' ends")
    settings: dict[str, list[str]] = {}  # {option: its words}
    loras: dict[str, list] = {name: [] for name in LORAS}
    session: dict[Path, int] = {}
    row = 0
    for line in standard_input():
        line = line.strip()
        if line == ":quit":
            break
        try:
            if line.startswith(":"):
                name, words = _setting(line)
                if name in LORAS:
                    _set_loras(pipe, loras, name, getattr(parse(words), name))
                else:
                    settings = _changed(settings, name, words)
            elif line:
                row += 1
                _serve_prompt(_parse_settings(args, settings), pipe, line, row, session)
        except BrokenPipeError:  # whoever reads the paths has gone
            raise
        except Exception as error:  # a bad line must not end the session that holds the weights
            known = isinstance(error, TdjaxError | OSError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            say(f"error: {_spelled(text)}")
    return _report(args, pipe)


def _serve_prompt(args, pipe, line: str, row: int, session: dict[Path, int]) -> None:
    """Makes the videos of one line. session: the files of the lines before, by row."""
    prompt = repaired(line)
    if prompt != line:
        pipe.stages.note("the line was not UTF-8: U+FFFD stands for what was not")
    job = Job(
        prompt=prompt,
        seed=args.seed,
        image=args.image_path,
        num_frames=args.num_frames,
        row=row,
    )
    job = with_seed(job, pipe.stages.note)
    pipe.request(prompt, **_call_arguments(args, job))
    facts = lambda job: asked(args, pipe, job)
    (task,) = outputs.assign(args, pipe.name, [job], pipe.stages.note, facts, session)
    _make(args, pipe, [task], {})


def _setting(line: str) -> tuple[str, list[str]]:
    """`:set OPTION VALUE` as (option, words of the command line), if the command would take them.
    The rest of the line is the value, with blanks or between quotes, unless the option takes
    several."""
    command, _, rest = line.partition(" ")
    name, _, value = rest.strip().partition(" ")
    value = value.strip()
    if command != ":set" or not value:
        raise UsageError(
            f"{line!r} is no command",
            ":set OPTION VALUE, or :quit",
            "a prompt does not begin with a colon",
        )
    option = cli.hyphens([f"--{name}"])[0]
    meant = [a for a in build_parser()._actions if option in a.option_strings]
    several = any(action.nargs == "+" for action in meant)
    if value[0] in "'\"" and value[0] == value[-1] and len(value) > 1:
        value = value[1:-1]
    new = [option, *value.split()] if several else [f"{option}={value}"]
    if any(word.startswith(("--", "-h")) for word in new[1:]):
        raise UsageError(
            f"{line!r} was not taken", "its value is an option", ":set seed 3 changes an option"
        )
    if any(action.dest in BEFORE for action in meant):
        raise UsageError(
            f"{option} in a session",
            "the model is opened, and the prompts are the lines",
            "end the session, and give it to the command",
        )
    parse(new)  # which refuses a name that is none
    return meant[0].dest, new


def _changed(settings: dict[str, list[str]], name: str, words: list[str]) -> dict[str, list[str]]:
    """A session's settings with one more, in the place of those that mean the same. Raises
    UsageError where the command would not take them together; of a size one side may be there and
    the other come with the next line, and a file that was made may have its name."""
    kept = {key: old for key, old in settings.items() if key not in INSTEAD.get(name, ())}
    kept |= {name: words}
    args = parse(_joined(kept))
    args.width = args.height if args.width is None else args.width
    args.height = args.width if args.height is None else args.height
    args.save_path = args.save_path if name == "save_path" else None
    check_early(args)
    return kept


def _joined(settings: dict[str, list[str]]) -> list[str]:
    return [word for words in settings.values() for word in words]


def _set_loras(pipe, loras: dict[str, list], name: str, given: list[str]) -> None:
    """Merges the LoRA files of a session. loras: {option: its pairs}; given: FILE:WEIGHT words of
    the option `name`, or none. Raises UsageError where the command began with some, which are in
    the weights for good."""
    if any(component.lora or component.beside for component in pipe.components.values()):
        raise UsageError(
            f"--{name} in a session that began with LoRA files",
            "those stay on the weights as they were read",
            "begin without them, and give them with :set",
        )
    files = [] if given == ["none"] else list(map(cli.lora_pair, given))
    chosen = {**loras, name: files}
    pipe.set_loras(chosen["lora"], lora_high=chosen["lora_high"], lora_low=chosen["lora_low"])
    loras.update(chosen)


def _parse_settings(args, settings: dict[str, list[str]]) -> argparse.Namespace:
    """The command's own options with the session's settings over them."""
    given = parse(_joined(settings))
    default = parse([])
    named = {*settings, *(other for name in settings for other in INSTEAD.get(name, ()))}
    # also what a synonym stands for, such as the sampler of --ode
    named |= {name for name, value in vars(given).items() if value != getattr(default, name)}
    return argparse.Namespace(**(vars(args) | {name: getattr(given, name) for name in named}))


def _spelled(message: str) -> str:
    return cli.spelled(message, cli.options(build_parser(), NAMES))


def _report(args, pipe) -> int:
    from tdjax.parallel import hosts

    if args.timings and hosts.first():
        print(pipe.stages.table(), file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
