"""What is answered before torch is imported, and what Ctrl-C does while it is."""

import json
import signal
import subprocess
import sys

import pytest

from specvlm import prune
from specvlm.core import names
from specvlm.kernels import quant
from specvlm.runtime.model import resolve_dtype
from specvlm.speculate import drafters
from specvlm_bench import names as bench_names

HEAVY = ("torch", "transformers", "av", "numpy", "matplotlib", "datasets", "huggingface_hub", "PIL")
SPEED = "bench speed"
QUALITY = "bench quality --out {folder}/out"
BAD = {  # a command line, and what its one line says
    "describe": "the following arguments are required: VIDEO",
    "describe {clip} --pruner bogus": "pruner='bogus' is not allowed: known are attention, frame, none",
    "describe {clip} --drafter bogus": "drafter='bogus' is not allowed: known are lookup, model, none, self",
    "describe {clip} --policy bogus": "policy='bogus' is not allowed: known are auto, fixed",
    "describe {clip} --tree bush": "tree='bush' is not allowed",
    "describe {clip} --tree 0,00,02,1x": "tree path '1x' is not allowed",
    "describe {clip} --tree 00": "has no parent",
    "describe {clip} --tree chain:0": "a chain has 1 to",
    "describe {clip} --tree dynamic:9": "write dynamic:NODES:DEPTH",
    "describe {clip} --tree chain:120 --lookup-tokens 20": "lookup_tokens=20 is not allowed: at most 7",
    "describe {clip} --positions sideways": "invalid choice: 'sideways'",
    "describe {clip} --score-layers 1,a": "score_layers='1,a' is not allowed",
    "describe {clip} --draft-quant int3": "draft_quant='int3' is not allowed: fp8, int8, int4",
    "describe {clip} --dtype float8": "dtype='float8' is not allowed",
    "describe {clip} --device cudaa": "device='cudaa' is not served",
    "describe {clip} --device cuda:x": "device='cuda:x' is not served",
    "describe {clip} --draft-device gpu": "draft_device='gpu' is not served",
    "describe {clip} --load {folder}/no.py": "no.py cannot be read",
    "describe {clip} --load {folder}": "cannot be read",
    "describe {clip} --target {folder}/model": "there is no directory {folder}/model",
    "describe {clip} --target ./model": "there is no directory ./model",
    "describe {clip} --target {clip}": "is no directory",
    "describe {clip} --draft no/such/model": "there is no directory no/such/model",
    "describe {folder}/no.mp4": "no.mp4' does not exist",
    "describe {clip} {folder}/no.mp4 -p what": "no.mp4' does not exist",
    "compare {clip} --fps 0": "fps=0.0 is not allowed",
    "compare {clip} --max-new-tokens many": "invalid int value: 'many'",
    "compare {folder}/no.mp4 --ties": "no.mp4' does not exist",
    "inspect {clip} -o heat.jpg": "give a name that ends in .png",
    "inspect {clip} -o {folder}/no/heat.png": "there is no folder",
    "inspect {clip} -o {folder}/heat.png --pruner bogus": "pruner='bogus' is not allowed",
    "verify --data nothing": "data='nothing' is unknown: give bundled",
    "verify --limit 0": "limit=0 is not allowed",
    "verify --ask nicely": "invalid choice: 'nicely'",
    "verify --data {folder}/no.jsonl": "no.jsonl cannot be read",
    "verify {clip} {folder}/no.mp4": "no.mp4' does not exist",
    "verify {clip} --data mvbench": "is not allowed beside a VIDEO",
    QUALITY + " --methods bogus": "method 'bogus' is not allowed: known are plain",
    QUALITY + " --methods plain@0.1": "prunes nothing",
    QUALITY + " --methods lookup@0.1": "prunes nothing",
    QUALITY + " --methods verifier --keep-ratios x": "keep_ratios='x' is not allowed",
    QUALITY + " --methods verifier@2": "keep_ratio=2.0 is not allowed",
    QUALITY + " --method mine tree=bush": "tree='bush' is not allowed",
    QUALITY + " --method mine pruner=bogus": "pruner='bogus' is not allowed",
    QUALITY + " --overlays -1": "overlays=-1 is not allowed",
    QUALITY + " --limit 0": "limit=0 is not allowed",
    QUALITY + " --preset bogus": "preset='bogus' is unknown",
    QUALITY + " --data nothing": "data='nothing' is unknown",
    QUALITY + " --tree bush": "tree='bush' is not allowed",
    QUALITY + " --load {folder}/no.py": "no.py cannot be read",
    "bench quality --out {clip}": "cannot be written",
    "bench quality --out /proc/x/y": "cannot be written",
    SPEED + " --pairs bogus": "pair 'bogus' is not known",
    SPEED + " --draft-quants x": "draft_quant 'x' is not known: choose from none, fp8, int8, int4",
    SPEED + " --methods bogus": "method 'bogus' is not known",
    SPEED + " --planted-drafts bogus": "planted_draft 'bogus' is not known",
    SPEED + " --trees bush": "tree='bush' is not allowed",
    SPEED + " --answer-tokens 8,no": "answer_tokens='8,no' is not allowed",
    SPEED + " --device cudaa": "device='cudaa' is not served",
    SPEED + " --dtype int8": "dtype='int8' is not allowed",
    SPEED + " --target {folder}/t --draft {folder}/d": "there is no directory {folder}/t",
    SPEED + " --out {folder}": "cannot be written",
    SPEED + " --out /proc/x/speed.jsonl": "cannot be written",
    SPEED + " --plots {clip}": "cannot be written",
    SPEED + " --from {folder}/no.jsonl": "no.jsonl cannot be read",
    "report {folder}/no": "cannot be read",
    "bench bogus": "invalid choice: 'bogus'",
    "bogus": "invalid choice: 'bogus'",
    "describe {clip} --bogus": "unknown argument '--bogus'",
}
ALL = """
import contextlib, io, json, sys
from specvlm.cli.main import main
for line in json.load(sys.stdin):
    before, err = set(sys.modules), io.StringIO()
    with contextlib.redirect_stderr(err):
        status = main(line.split())
    heavy = sorted({*HEAVY} & (set(sys.modules) - before))
    print(json.dumps([status, err.getvalue(), heavy]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Return status, stderr and the heavy modules that it imported, of every bad command line."""
    folder = tmp_path_factory.mktemp("lazy")
    clip = folder / "clip.mp4"
    clip.write_bytes(b"no film")
    lines = [line.format(clip=clip, folder=folder) for line in BAD]
    script = ALL.replace("HEAVY", repr(HEAVY))
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps(lines), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in folder.iterdir()] == ["clip.mp4"]
    return folder, dict(zip(BAD, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("line", BAD)
def test_a_bad_command_line_is_answered_without_torch(line, answers):
    folder, found = answers
    status, err, heavy = found[line]
    assert (status, heavy, err.count("\n")) == (2, [], 1)
    assert BAD[line].format(folder=folder) in err


def test_the_names_told_without_torch_are_those_that_are_registered():
    own = {name for name, found in prune.PRUNERS.items() if found.__module__.startswith(f"{prune.__name__}.")}
    assert own == {*names.pruners()}
    built_in = {name: cls for name, cls in drafters.DRAFTERS.items() if cls.__module__.startswith(drafters.__name__)}
    assert {name: cls.prunes for name, cls in built_in.items()} == names.DRAFTERS
    from specvlm_bench import peers, planted

    assert {*peers.PEERS} == {*bench_names.PEERS}
    assert {*planted.RANKS} - {"self"} | {"changing"} == {*bench_names.PLANTED_DRAFTS}
    for format in names.QUANTS:
        assert quant.is_served(format, quant.torch.device("cpu")) is (format == "int8")
    for name in names.DTYPES:
        assert str(resolve_dtype(name, quant.torch.device("cpu"))) == f"torch.{name}"


def test_a_name_that_a_file_registers_is_known_once_it_ran(tmp_path, capsys):
    from specvlm.cli import main as cli

    file = tmp_path / "mine.py"
    file.write_text("")
    assert cli.main(["describe", str(file), "-p", "?", "--load", str(file), "--pruner", "bogus"]) == 2
    assert "pruner='bogus' is not allowed" in capsys.readouterr().err  # told by the engine, after the file


# Ctrl-C


FIRST = """
import signal, sys
class Found(Exception): pass
def fail(*_): raise Found
signal.signal = fail
before = set(sys.modules)
try: import specvlm.__main__; specvlm.__main__.run()
except Found: print(*sorted(set(sys.modules) - before))
"""


def test_nothing_is_imported_before_ctrl_c_is_a_line():
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["__future__", "specvlm", "specvlm.__main__", "specvlm.cli", "specvlm.cli.interrupts"]


@pytest.mark.parametrize("delay", [0.02, 0.1, 0.4])
def test_ctrl_c_while_it_starts_is_a_line_or_silence(delay):
    process = subprocess.Popen([sys.executable, "-m", "specvlm", "describe", "-"], stdin=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    ours = "specvlm/" in err
    assert process.returncode == 130 or (process.returncode in (-signal.SIGINT, 1) and not ours)
    assert not (ours and "Traceback" in err)
