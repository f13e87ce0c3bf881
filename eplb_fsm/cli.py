"""The command line: `eplb-fsm demo`, `decode`, `plan`, `compare`, `spec`, `trace`, `simulate`, `sglang` and `vllm`.

Exit status: 0 all went as promised; 1 a promise was broken (runs differ, an epoch failed, nothing was committed, a
rank was lost); 2 wrong usage or a configuration that cannot work; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from eplb_fsm.config import ENV_PREFIX, RebalanceConfig
from eplb_fsm.engines.serve import make_serve
from eplb_fsm.engines.switch import FLAG
from eplb_fsm.errors import ConfigError, EplbError
from eplb_fsm.modelcheck.command import add_spec_command, run_spec
from eplb_fsm.modelcheck.trace_command import add_trace_command, run_trace
from eplb_fsm.offline.arguments import add_compare_arguments, add_plan_arguments
from eplb_fsm.simulate.arguments import add_arguments as add_simulate_arguments

if TYPE_CHECKING:
    from eplb_fsm.engines.demo.progress import Screen
    from eplb_fsm.engines.reference.run import Tamper

OK, BROKEN_PROMISE, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

SERVING_ENGINES = (
    ("sglang", "SGLang", "python -m sglang.launch_server"),
    ("vllm", "vLLM", "vllm"),
)

OPTION_FLAGS = {
    "--eplb-algorithm": "policy",
    "--eplb-rebalance-num-iterations": "step_interval",
    "--expert-distribution-recorder-buffer-size": "window_size",
    "--ep-num-redundant-experts": "num_redundant_experts",
    "--eplb-min-rebalancing-utilization-threshold": "trigger_balancedness",
}
"""SGLang's flags for our options; `docs/reference/options.md` says where the meaning differs."""


def _count(text: str) -> int:
    """Return a number from 1; argparse makes an error message of the exception."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_count.__name__ = "number from 1"


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message: str) -> Any:
        """Write the line, with the way to help, and exit."""
        self.exit(WRONG_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(prog="eplb-fsm", description="Background rebalance of expert-parallel MoE inference.")
    parser.add_argument("--version", action="version", version=f"eplb-fsm {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    demo = commands.add_parser(
        "demo",
        help="decode text three times: without rebalancing, with sync, with async; compare",
        description="Decode text whose domain changes half-way, three times: without rebalancing, with sync and "
        "with async, and compare pauses, balance and results. Variables EPLB_FSM_<OPTION> are read too.",
    )
    _add_common(demo, ranks="processes (default 4)")
    decode = commands.add_parser(
        "decode",
        help="run the reference engine once, also under torchrun",
        description="Run the reference engine once on --ranks processes of this machine, or as one rank under "
        "torchrun. Variables EPLB_FSM_<OPTION> are read too.",
    )
    _add_common(decode, ranks="processes (default 4; under torchrun: as many as it started)")
    decode.add_argument("--model-path", type=Path, metavar="FOLDER", help="a Qwen3-MoE model; default: the shipped one")
    group = decode.add_argument_group("switches")
    group.add_argument("--enable-eplb", action="store_true", help="rebalance")
    group.add_argument(
        "--enable-eplb-rebalance-async", action="store_true", help="rebalance in the background; without it: sync"
    )
    add_plan_arguments(
        commands.add_parser(
            "plan",
            help="make a placement file from recorded loads",
            description="Make a placement from recorded loads, and say what it changes and gains.",
        )
    )
    add_compare_arguments(
        commands.add_parser(
            "compare",
            help="run all policies on recorded loads",
            description="Have policies plan for one recorded window after the other, each from its own placement, and "
            "show how balanced this and the next window are, what moves, and how long a plan takes.",
        )
    )
    add_spec_command(commands, _Parser)
    add_trace_command(commands, _Parser)
    simulate = commands.add_parser(
        "simulate",
        help="explore seeded interleavings of ranks, workers and faults",
        description="Run the state machines of all ranks in one process under a seeded schedule with faults, once for "
        "each seed, and check every invariant.",
    )
    add_simulate_arguments(simulate)
    for engine, title, example in SERVING_ENGINES:
        serve = commands.add_parser(
            engine,
            help=f"start {title}, with {FLAG} if that is given",
            prefix_chars="\0",  # every argument is the engine's own
            add_help=False,
        )
        serve.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help=f"of {example}")
    return parser


def _add_common(parser: argparse.ArgumentParser, ranks: str) -> None:
    add = parser.add_argument
    add("--ranks", type=_count, metavar="N", help=ranks)
    add("--steps", type=_count, default=1000, metavar="N", help="forward passes (default %(default)s)")
    add("--batch", type=_count, default=8, metavar="N", help="sequences of each rank at a time (default %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the requests (default %(default)s)")
    add(
        "--domains",
        default="code,chinese",
        metavar="A,B",
        help="domain of the text first and after the change half-way (default %(default)s); "
        "of code, english, logs, json, russian, chinese",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--trace", type=Path, metavar="DIR", help="write the NDJSON trace of each rank, in a folder for each run")
    add("--no-live", action="store_true", help="write lines instead of the live display")
    add("--quiet", action="store_true", help="no progress at all")
    group = parser.add_argument_group("rebalance options, under the names of SGLang and vLLM")
    group.add_argument("--eplb-algorithm", metavar="NAME", help="policy")
    group.add_argument("--eplb-rebalance-num-iterations", type=int, metavar="N", help="steps between two epochs")
    group.add_argument(
        "--expert-distribution-recorder-buffer-size", type=int, metavar="N", help="steps of load that a plan is made of"
    )
    group.add_argument("--ep-num-redundant-experts", type=int, metavar="N", help="slots beyond one for each expert")
    group.add_argument(
        "--eplb-min-rebalancing-utilization-threshold",
        type=float,
        metavar="X",
        help="balancedness from which on nothing is moved",
    )
    group.add_argument("--init-expert-location", type=Path, metavar="FILE", help="placement to start with")
    group.add_argument("--eplb-config", metavar="JSON", help="any option by its name: '{\"commit_bytes\": 1000000}'")


def _version() -> str:
    try:
        return version("eplb-fsm")
    except PackageNotFoundError:  # run from a checkout
        return "0 (not installed)"


# -- options ------------------------------------------------------------------------------------------------


def read_config(
    args: argparse.Namespace, environ: Mapping[str, str], defaults: Mapping[str, Any], *, may_set_mode: bool
) -> RebalanceConfig:
    """Return the rebalance options: an argument wins over the JSON, that over the environment, that over defaults.

    Raises:
        ConfigError: Naming the option and what to change.
    """
    given = _json_options(args.eplb_config) if args.eplb_config is not None else {}
    if "mode" in given and not may_set_mode:
        raise ConfigError("--eplb-config sets the mode, but the demo runs both: leave it out")
    for flag, option in OPTION_FLAGS.items():
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None:
            given[option] = value
    if getattr(args, "enable_eplb_rebalance_async", False):
        given["mode"] = "async"
    if not may_set_mode:
        environ = {name: value for name, value in environ.items() if name != f"{ENV_PREFIX}MODE"}
    kept = {name: value for name, value in defaults.items() if f"{ENV_PREFIX}{name.upper()}" not in environ}
    return RebalanceConfig.from_env(environ, **{**kept, **given})


def _json_options(text: str) -> dict[str, Any]:
    """Return the options in the JSON of `--eplb-config`; vLLM's `use_async` is our `mode`."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f'--eplb-config is not JSON ({error}): give an object such as {{"window_size": 500}}'
        ) from error
    if not isinstance(options, dict):
        raise ConfigError(f"--eplb-config is a JSON {type(options).__name__}: give an object of options")
    if "use_async" not in options:
        return options
    use_async = options.pop("use_async")
    if not isinstance(use_async, bool) or "mode" in options:
        raise ConfigError(f"--eplb-config: use_async is {use_async!r}: give true or false, and no mode beside it")
    return {**options, "mode": "async" if use_async else "sync"}


def _domains(text: str) -> tuple[str, str]:
    first, comma, second = text.partition(",")
    if not comma or "," in second:
        raise ConfigError(f"--domains {text}: name two domains, as in --domains code,chinese")
    return first.strip(), second.strip()


def _check_files(args: argparse.Namespace) -> None:
    """Find out before a minute of work that its result could not be written."""
    trace = getattr(args, "trace", None)
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: the folder {args.json.parent} does not exist; make it first")
    if trace is not None and trace.exists() and not trace.is_dir():
        raise ConfigError(f"--trace {trace} is a file: name a folder")


# -- commands -----------------------------------------------------------------------------------------------


def _make_screen(args: argparse.Namespace, title: str, names: Sequence[str]) -> Screen:
    from eplb_fsm.engines.demo.progress import LineScreen, SilentScreen

    if args.quiet:
        return SilentScreen()
    if not args.no_live and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        try:
            from rich.console import Console

            from eplb_fsm.engines.demo.live import LiveScreen
        except ImportError:
            pass
        else:
            return LiveScreen(title, names, args.steps, Console())
    return LineScreen(names, args.steps, sys.stderr)


def _write_json(path: Path | None, report: Mapping[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written ({error.strerror}); name another file") from error


def _demo(args: argparse.Namespace, tamper: Tamper | None) -> int:
    from eplb_fsm.engines.demo.options import RUNS, DemoOptions, demo_defaults
    from eplb_fsm.engines.demo.run import run_demo
    from eplb_fsm.engines.demo.table import demo_table

    ranks = args.ranks or 4
    config = read_config(args, os.environ, demo_defaults(args.steps, ranks), may_set_mode=False)
    options = DemoOptions(
        ranks=ranks,
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        domains=_domains(args.domains),
        config=config,
        placement=args.init_expert_location,
        trace=args.trace,
    )
    title = f"{ranks} ranks decode {options.domains[0]}, from step {options.change_step} on {options.domains[1]}"
    with _make_screen(args, title, RUNS) as screen:
        report = run_demo(options, screen.on_message, tamper)
    _write_json(args.json, report)
    print(demo_table(report))
    for problem in report["problems"]:
        print(f"\nBROKEN: {problem}", end="")
    print("\nThe three runs gave identical tokens and logits." if not report["problems"] else "")
    return BROKEN_PROMISE if report["problems"] else OK


def _decode(args: argparse.Namespace) -> int:
    from eplb_fsm.engines.demo.decode import DecodeOptions, run_decode
    from eplb_fsm.engines.demo.table import decode_table

    if args.enable_eplb_rebalance_async and not args.enable_eplb:
        raise ConfigError("--enable-eplb-rebalance-async says how to rebalance: add --enable-eplb")
    config = read_config(args, os.environ, {"mode": "sync"}, may_set_mode=True)
    options = DecodeOptions(
        ranks=args.ranks,
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        domains=_domains(args.domains),
        config=config if args.enable_eplb else None,
        num_redundant_experts=config.num_redundant_experts,
        placement=args.init_expert_location,
        trace=args.trace,
        model=args.model_path,
    )
    name = options.name
    if options.is_under_torchrun and options.rank != 0:
        args.quiet = True
    with _make_screen(args, f"{options.world_size} ranks decode", [name]) as screen:
        report = run_decode(options, screen.on_message)
    if report is None:  # another rank than the first under torchrun
        return OK
    _write_json(args.json, report)
    print(decode_table(report["runs"][name], name, change=True))
    for note in (*report["problems"], *report["notes"]):
        print(f"\n{note}")
    return BROKEN_PROMISE if report["problems"] else OK


def _simulate(args: argparse.Namespace) -> int:
    from multiprocessing import get_context

    from eplb_fsm.simulate.command import run_command

    num_processes = 1 if args.verbose else args.jobs or os.cpu_count() or 1
    # A fork would take torch's threads half along.
    with get_context("spawn").Pool(num_processes) if num_processes > 1 else nullcontext() as pool:
        status, figures, text = run_command(args, pool.imap_unordered if pool else map, num_processes)
    _write_json(args.json, figures)
    print(text)
    return status


def _offline(args: argparse.Namespace) -> int:
    from eplb_fsm.offline.compare_command import run_compare
    from eplb_fsm.offline.plan_command import run_plan

    figures, text = (run_plan if args.command == "plan" else run_compare)(args)
    _write_json(args.json, figures)
    print(text)
    return OK


def _serve(args: argparse.Namespace) -> NoReturn:
    """Become the engine's process, so that signals and the exit status are its own."""
    serve = make_serve(args.command, args.arguments, os.environ)
    sys.stdout.flush()
    os.execve(serve.command[0], serve.command, serve.environ)


class Failure(NamedTuple):
    """How a command ended that did not come to its end."""

    status: int
    message: str


def _run(args: argparse.Namespace, tamper: Tamper | None) -> int | Failure:
    try:
        if args.command == "spec":
            return run_spec(args, os.environ)
        if args.command == "trace":
            return run_trace(args, os.environ)
        if args.command in (engine for engine, *_ in SERVING_ENGINES):
            _serve(args)
        _check_files(args)
        if args.command == "simulate":
            return _simulate(args)
        if args.command in ("plan", "compare"):
            return _offline(args)
        return _demo(args, tamper) if args.command == "demo" else _decode(args)
    except KeyboardInterrupt:
        return Failure(INTERRUPTED, "interrupted; all processes are ended")
    except EplbError as error:
        return Failure(WRONG_USAGE if isinstance(error, ValueError) else BROKEN_PROMISE, str(error))
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "safetensors"):
            raise
        return Failure(WRONG_USAGE, f"{error.name} is missing: install the engine with pip install 'eplb-fsm[engine]'")


def main(argv: Sequence[str] | None = None, *, tamper: Tamper | None = None) -> int:
    """Run one command; blocks until it is done.

    Args:
        argv: Arguments without the program's name; None for those of the process.
        tamper: Damages the engine, so that a test can see the demo notice it.

    Returns:
        The exit status.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    args = make_parser().parse_args(argv)
    result = _run(args, tamper)
    if isinstance(result, Failure):
        print(f"eplb-fsm {args.command}: error: {result.message}", file=sys.stderr)
        return result.status
    return result
