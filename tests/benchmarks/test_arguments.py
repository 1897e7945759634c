"""Every command names an invalid option and says what it expects; documented ones are accepted."""

import re
import shlex
from importlib import import_module

import pytest

from tests.benchmarks.helpers import REPOSITORY

WRONG = {
    "__main__": [(["--json", "no_such_folder"], "argument --json: there is no folder no_such_folder; make it first")],
    "accuracy": [
        ([], "--data None: expected the folder that holds cifar-10-batches-py"),
        (["--data", "no_such_folder"], "--data no_such_folder: expected the folder that holds cifar-10-batches-py"),
        (["--data", ".", "--contenders", "plain,gossip"], "argument --contenders: expected some of ddp, plain"),
        (["--data", ".", "--workers", "1"], "argument --workers: expected int of at least 2, got '1'"),
        (["--data", ".", "--period", "3"], "--period 3: expected more steps than overlap=3, which is compared too"),
        (
            ["--data", ".", "--contenders", "plain,stagger-overlap", "--period", "1"],
            "--period 1: expected more steps than overlap=1",
        ),
        (["--data", ".", "--json", "no_such_folder/file.json"], "there is no folder"),
    ],
    "codec": [
        (["--codecs", "int4,int2"], "argument --codecs: expected some of bf16, fp16, int8, int4, got 'int2'"),
        (["--numel", "0"], "argument --numel: expected int of at least 1024, got '0'"),
        (["--workers", "1"], "argument --workers: expected int of at least 2, got '1'"),
        (["--gbit", "fast"], "argument --gbit: expected float of at least 1e-06, got 'fast'"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--json", "no_such_folder/file.json"], "there is no folder"),
    ],
    "elastic": [
        (["--workers", "2,1"], "argument --workers: expected int from 2 to 250, got '1'"),
        (["--parameters", "none"], "argument --parameters: expected float from 1e-06 to 10000, got 'none'"),
        (["--turns", "0"], "argument --turns: expected int of at least 1, got '0'"),
        (["--parameters", "0.001", "--tensors", "5000"], "--tensors 5000: expected at most as many as there are"),
        (["--json", "no_such_folder/file.json"], "there is no folder"),
    ],
    "gpu": [
        (["--parts", "training,test"], "argument --parts: expected some of local-step, round, training, trace"),
        (["--backend", "mpi"], "argument --backend: invalid choice: 'mpi'"),
        (["--ranks", "1"], "argument --ranks: expected int from 2 to 64, got '1'"),
        (["--period", "1"], "argument --period: expected int of at least 2, got '1'"),
        (["--traces", "no_such_folder"], "argument --traces: there is no folder no_such_folder; make it first"),
        (["--rehearse", "--backend", "nccl"], "NCCL is for GPUs only"),
        (["--tensors", "5000", "--parameters", "0.001"], "--tensors 5000: expected at most as many"),
    ],
    "interface_bytes": [
        (["--hosts", "1"], "argument --hosts: expected int from 2 to 250, got '1'"),
        (["--steps", "many"], "argument --steps: expected int of at least 1, got 'many'"),
        (["--settle", "-1"], "argument --settle: expected float of at least 0, got '-1'"),
        (["--json", "no_such_folder/file.json"], "there is no folder"),
    ],
    "link": [
        (["--hosts", "1"], "argument --hosts: expected int from 2 to 250, got '1'"),
        (["--ranks-per-host", "0"], "argument --ranks-per-host: expected int of at least 1, got '0'"),
        (["--rate-mbit", "slow"], "argument --rate-mbit: expected float of at least 1, got 'slow'"),
        (["--parameters", "7"], "argument --parameters: expected int of at least 10000, got '7'"),
        (["--learning-rate", "nan"], "argument --learning-rate: expected float of at least 0, got 'nan'"),
        (["--until-loss", "low"], "argument --until-loss: expected float of at least 0, got 'low'"),
        (["--contenders", "ddp,dpp"], "argument --contenders: expected some of none, none-loop, ddp,"),
        (["--contenders", "ddp,dpp"], "got 'dpp'"),
        (["--contenders", "even"], "--contenders: even: it needs the mean period of another run; see --mean-period"),
        (["--contenders", "adpsgd-overlap", "--period", "1"], "overlap=1 needs a longer period than 1"),
        (["--mean-period", "0.5"], "argument --mean-period: expected float of at least 1, got '0.5'"),
        (["--contenders", "none", "--until-loss", "ddp"], "expected ddp to be among the --contenders"),
        (["--model", "resnet8", "--pause-ms", "5"], "only --model mlp can sleep"),
        (["--images", "100"], "describe the images in --data"),
        (["--data", "no_such_folder"], "--data no_such_folder: there is no such folder"),
        (["--json", "no_such_folder/file.json"], "there is no folder"),
    ],
    "local_step": [
        (["--ranks", "0"], "argument --ranks: expected int of at least 1, got '0'"),
        (["--models", "few,huge"], "argument --models: expected some of few, many, got 'huge'"),
        (["--fits", "0"], "argument --fits: expected int of at least 1, got '0'"),
        (["--turns", "none"], "argument --turns: expected int of at least 1, got 'none'"),
        (["--stretch-seconds", "0"], "argument --stretch-seconds: expected float from 0.001 to 3600, got '0'"),
        (["--json", "no_such_folder/file.json"], "there is no folder"),
    ],
    "paper.__main__": [
        (["--scale", "huge"], "argument --scale: invalid choice: 'huge'"),
        (["--studies", "gossip"], "argument --studies: expected some of paper, cosine"),
        (["--seeds", "0"], "argument --seeds: expected int of at least 1, got '0'"),
        (["--backend", "nccl", "--device", "cpu"], "--backend nccl: expected --device cuda"),
        (["--page", "no_such_folder/results.md"], "there is no folder"),
    ],
    "round": [
        (["--ranks", "1"], "argument --ranks: expected int from 2 to 250, got '1'"),
        (["--parameters", "1,none"], "argument --parameters: expected float from 1e-06 to 10000, got 'none'"),
        (["--rate-mbit", "slow"], "argument --rate-mbit: expected float of at least 1, got 'slow'"),
        (["--parameters", "0.001", "--tensors", "8,5000"], "--tensors 5000: expected at most as many as there are"),
        (["--bucket-size-mb", "0"], "argument --bucket-size-mb: expected float from 1e-06"),
        (["--json", "no_such_folder/file.json"], "there is no folder"),
    ],
    "survival.__main__": [
        (["--workers", "2"], "argument --workers: expected int from 3 to 200, got '2'"),
        (["--faults", "kill,flood"], "argument --faults: expected some of kill, stop, cut, lighthouse, got 'flood'"),
        (["--kills", "10", "--seconds", "5"], "argument --seconds: not allowed with argument --kills"),
        (["--kills", "10", "--faults", "stop"], "--kills 10: expected kill among the --faults"),
        (["--kills", "2", "--seeds", "3"], "--kills 2: expected at least one for each of 3 seeds"),
        (["--contender", "horovod"], "argument --contender: invalid choice: 'horovod'"),
        (["--json", "no_such_folder/file.json"], "there is no folder"),
    ],
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_option_is_named_with_what_is_expected(command, capsys):
    main = import_module(f"benchmarks.{command}").main
    for arguments, named in WRONG[command]:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2, arguments
        assert named in capsys.readouterr().err, arguments


def documented():
    """Command lines of the documentation, without ``python -m``."""
    for page in ("README.md", "docs/performance.md", "docs/results.md"):
        text = (REPOSITORY / page).read_text().replace("\\\n", " ")
        for command in re.findall(r"python -m (benchmarks\.[^`\n]*)", text):
            yield command.strip()


COMMANDS = sorted(set(documented()))


def test_documentation_has_the_command_of_each_benchmark():
    modules = {command.split()[0].removeprefix("benchmarks.") for command in COMMANDS}
    assert modules == {"accuracy", "codec", "gpu", "interface_bytes", "link", "local_step", "paper", "round"}


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command_is_accepted(command, tmp_path, monkeypatch):
    module, *arguments = shlex.split(command)
    (tmp_path / "data").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    if "gpu" in arguments:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    import_module(f"{module}.__main__" if module == "benchmarks.paper" else module).parse(arguments)
