"""VRAM between processes: opened by each kind of handle, alive after its maker where that is promised, refused with the reason."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.processes import PATIENCE_S, REPOSITORY, child_environment

MIB = 1 << 20
KINDS = ("vmm", "ipc")


def made(process, kind="auto", *, device="cuda:0"):
    """Handle and UUID of a MiB."""
    word, *rest = process.ask(f"create {kind} {device} {MIB}").split()
    assert word == "made", (word, rest)
    return rest


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_reads_and_writes_what_was_zeros_at_first(environment, start, kind):
    owner, reader = start(environment), start(environment)
    handle, uuid = made(owner, kind)
    assert bytes.fromhex(handle).startswith(kind.encode())
    assert owner.ask(f"load {MIB // 8 - 1}") == "word 0"
    owner.ask("store 3 4711")
    assert reader.ask(f"open {handle} {MIB} {uuid} {uuid}") == "opened"
    assert reader.ask("load 3") == "word 4711"
    reader.ask("store 4 18446744073709551615")
    assert owner.ask("load 4") == "word 18446744073709551615"
    assert reader.ask("close") == "done"
    assert owner.ask("load 3") == "word 4711"


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_what_is_mapped_by_a_vmm_handle_outlives_its_maker(environment, start, runtime_dir, how):
    owner, reader, late = start(environment), start(environment), start(environment)
    handle, uuid = made(owner, "vmm")
    owner.ask("store 5 55")
    assert reader.ask(f"open {handle} {MIB} {uuid} {uuid}") == "opened"
    if how == "killed":
        owner.child.kill()
    else:
        assert owner.ask("close") == "done"
        assert not list(runtime_dir.glob("*.sock"))
    assert reader.ask("load 5") == "word 55"
    reader.ask("store 6 66")
    assert reader.ask("load 6") == "word 66"
    assert "its process is gone" in late.ask(f"open {handle} {MIB} {uuid} {uuid}")
    assert reader.ask("close") == "done"


def test_its_own_process_opens_a_vmm_handle_too_and_one_of_cuda_ipc_not(environment, start):
    process = start(environment)
    handle, uuid = made(process, "vmm")
    process.ask("store 1 11")
    assert process.ask(f"open {handle} {MIB} {uuid} {uuid}") == "opened"
    assert process.ask("load 1") == "word 11"
    handle, uuid = made(process, "ipc")
    refusal = process.ask(f"open {handle} {MIB} {uuid} {uuid}")
    assert refusal.startswith(
        f"refused UnavailableError: the segment on {uuid} cannot be opened (ipc): cuIpcOpenMemHandle"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_there_is_is_refused_with_both_numbers_and_what_helps(environment, start, runtime_dir, kind):
    asked = 1 << 50
    refusal = start(environment).ask(f"create {kind} cuda:0 {asked}")
    assert refusal.startswith("refused CapacityError: a segment of 1024TiB was asked for on")
    assert " are free there" in refusal and "gpu_memory_utilization" in refusal
    assert not list(runtime_dir.glob("*.sock"))


def test_a_device_that_is_not_there_is_refused(environment, start):
    refusal = start(environment).ask(f"create auto cuda:99 {MIB}")
    assert refusal.startswith("refused UnavailableError: device 'cuda:99'") and "CUDA_VISIBLE_DEVICES" in refusal


def test_a_process_that_makes_or_opens_vram_loads_no_torch_for_it(environment, start):
    owner, reader = start(environment), start(environment)
    handle, uuid = made(owner)
    reader.ask(f"open {handle} {MIB} {uuid} {uuid}")
    assert owner.ask("modules") == reader.ask("modules") == "modules without torch"


@pytest.mark.parametrize("bad", ["00", b"vmm 99 ../../x".hex(), b"vmm 1048576 segment-.sock".hex(), b"ipc short".hex()])
def test_handles_that_are_none_are_refused(environment, start, bad):
    process = start(environment)
    _, uuid = made(process)
    assert process.ask(f"open {bad} {MIB} {uuid} {uuid}").startswith("refused CorruptionError")


@pytest.mark.parametrize("kind", KINDS)
def test_making_opening_and_closing_over_and_over_takes_nothing(environment, start, runtime_dir, kind):
    owner, reader = start(environment), start(environment)
    held: list[list[int]] = []  # descriptors and threads of both
    for cycle in range(50):
        handle, uuid = made(owner, kind)
        assert reader.ask(f"open {handle} {MIB} {uuid} {uuid}") == "opened"
        assert reader.ask("close") == owner.ask("close") == "done"
        if cycle in (1, 49):  # after whatever is made once; a driver may open some more of its own, but not for each
            held.append([int(number) for process in (owner, reader) for number in process.ask("counts").split()[1:]])
    assert all(last - first < 10 for first, last in zip(*held, strict=True)), held
    assert not list(runtime_dir.glob("*.sock"))


def test_a_maker_that_does_not_answer_costs_one_wait(stand_in, start):
    owner, reader = start(stand_in), start(stand_in)
    handle, uuid = made(owner)
    owner.child.suspend()
    assert "its process is stopped or busy" in reader.ask(f"open {handle} {MIB} {uuid} {uuid}")
    assert "no answer a moment ago" in reader.ask(f"open {handle} {MIB} {uuid} {uuid}")
    owner.child.resume()


# --- what only the stand-in shows ---------------------------------------------------------------------------------


def test_a_reader_on_another_device_makes_no_context_on_the_makers(stand_in, start):
    owner, reader = start(stand_in), start(stand_in)
    for kind in KINDS:
        handle, uuid = made(owner, kind, device="cuda:0")
        owner.ask("store 9 99")
        assert reader.ask(f"open {handle} {MIB} {uuid} cuda:1") == "opened"
        assert reader.ask("load 9") == "word 99"
        assert reader.ask("close") == "done"
    assert "context on 1" in reader.calls() and "context on 0" not in reader.calls()
    assert "access of 1" in reader.calls() and "access of 0" not in reader.calls()


@pytest.mark.parametrize("kind", KINDS)
def test_without_peer_access_opening_is_refused_and_names_both(stand_in, start, kind):
    owner, reader = start(stand_in), start(stand_in, peers="0")
    handle, uuid = made(owner, kind)
    refusal = reader.ask(f"open {handle} {MIB} {uuid} cuda:1")
    assert refusal.startswith(f"refused UnavailableError: device cuda:1 has no peer access to memory of {uuid}")
    assert reader.ask(f"open {handle} {MIB} {uuid} cuda:0") == "opened"


@pytest.mark.parametrize(
    ("attribute", "what"), [("102", "virtual memory management"), ("103", "handles by file descriptor")]
)
def test_a_driver_without_vmm_handles_is_found_out(stand_in, start, attribute, what):
    process = start(stand_in, lacks=attribute)
    handle, _ = made(process, "auto")
    assert bytes.fromhex(handle).startswith(b"ipc ")
    assert (
        f"is shared by CUDA IPC instead of VMM handles: driver or device have no {what}"
        in process.child.log.read_text()
    )
    refusal = process.ask(f"create vmm cuda:0 {MIB}")
    assert refusal.startswith("refused UnavailableError: segment.cuda_handles = 'vmm'") and what in refusal


GIVEN_BACK = {
    "cuMemCreate": "cuMemRelease",
    "cuMemImportFromShareableHandle": "cuMemRelease",
    "cuMemAddressReserve": "cuMemAddressFree",
    "cuMemMap": "cuMemUnmap",
    "cuMemAlloc": "cuMemFree",
    "cuIpcOpenMemHandle": "cuIpcCloseMemHandle",
    "cuStreamCreate": "cuStreamDestroy",
}


def nothing_is_left(calls, failed):
    """Whether all that was taken was given back, what was taken last first; the release of a handle may come at any time."""
    taken = [GIVEN_BACK[call] for call in calls if call in GIVEN_BACK and call != failed]
    given = [call for call in calls if call in GIVEN_BACK.values()]
    early = {"cuMemRelease", "cuStreamDestroy"}
    in_order = [call for call in given if call not in early] == [call for call in reversed(taken) if call not in early]
    return sorted(taken) == sorted(given) and in_order


ZEROING = ["cuStreamCreate", "cuMemsetD8Async", "cuStreamSynchronize"]
IMPORTING = ["cuMemImportFromShareableHandle"]
MAPPING = ["cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"]


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("vmm", ["cuMemCreate", *MAPPING, "cuMemExportToShareableHandle", *IMPORTING, *ZEROING]),
        ("ipc", ["cuMemAlloc", "cuIpcGetMemHandle", *ZEROING]),
    ],
)
def test_memory_whose_making_fails_at_any_step_leaves_nothing(stand_in, start, runtime_dir, kind, steps):
    process = start(stand_in)
    before = process.ask("counts")
    for step in steps:
        process.ask(f"fail {step}")
        begin = len(process.calls())
        refusal = process.ask(f"create {kind} cuda:0 {MIB}")
        assert refusal.startswith("refused") and step in refusal
        assert process.ask("counts") == before
        calls = process.calls()[begin:]
        assert step in calls and nothing_is_left(calls, step), calls
        assert not list(runtime_dir.glob("*.sock"))


@pytest.mark.parametrize(("kind", "steps"), [("vmm", [*IMPORTING, *MAPPING]), ("ipc", ["cuIpcOpenMemHandle"])])
def test_memory_whose_opening_fails_at_any_step_leaves_nothing(stand_in, start, kind, steps):
    owner, reader = start(stand_in), start(stand_in)
    handle, uuid = made(owner, kind)
    before = reader.ask("counts")
    for step in steps:
        reader.ask(f"fail {step}")
        begin = len(reader.calls())
        refusal = reader.ask(f"open {handle} {MIB} {uuid} {uuid}")
        assert refusal.startswith("refused UnavailableError") and step in refusal
        assert reader.ask("counts") == before
        calls = reader.calls()[begin:]
        assert step in calls and nothing_is_left(calls, step), calls


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_closed_is_given_back_whole_even_if_a_step_fails(stand_in, start, kind):
    failing = {"vmm": "cuMemUnmap", "ipc": "cuMemFree"}[kind]
    process = start(stand_in)
    before = process.ask("counts")
    for failure in ("none", failing):
        process.ask(f"fail {failure}")
        begin = len(process.calls())
        made(process, kind)
        assert process.ask("close") == "done"
        assert process.ask("counts") == before or failure == failing
        calls = process.calls()[begin:]
        assert nothing_is_left(calls, None), calls
        assert "cuCtxSynchronize" not in calls  # it would spoil a capture
    assert failing in process.child.log.read_text()


WORDS = """
import sys, secrets
from pathlib import Path
import numpy as np
from vcache.memory.cuda import CudaMemory
from vcache.pool.runtime_dir import RuntimeDir
words = CudaMemory.create(RuntimeDir(Path(sys.argv[1])), secrets.token_bytes(16), 1 << 20, device="cuda:0").words
chance = np.random.default_rng(1)
values = chance.integers(0, 1 << 63, 1 << 17, dtype=np.uint64)
words.store_run(0, values)
words.fence()
assert (words.load_run(100, 5000) == values[100:5100]).all()
for shape in ((0,), (1,), (7, 3), (500,)):
    at = chance.integers(0, 1 << 17, shape)
    assert (words.load_each(at) == values[at]).all() and words.load_each(at).shape == shape
assert (words.load_each(np.arange(15, 1 << 17, 16)) == values[15::16]).all()
print("same")
"""


COPIES = """
import sys, secrets
from pathlib import Path
import numpy as np
from vcache.memory.copying import aside, copy_between
from vcache.memory.cuda import CudaMemory
from vcache.memory.host import HostMemory
from vcache.pool.runtime_dir import RuntimeDir
runtime, mib = RuntimeDir(Path(sys.argv[1])), 1 << 20
host, back = (HostMemory.create(runtime, secrets.token_bytes(16), mib) for _ in range(2))
vram, more = (CudaMemory.create(runtime, secrets.token_bytes(16), mib, device="cuda:0") for _ in range(2))
host.array[:] = np.random.default_rng(1).integers(0, 256, mib)
with aside(vram):
    copy_between(host, 0, vram, 4096, mib - 4096)
    copy_between(vram, 4096, more, 0, mib - 4096)
    copy_between(more, 100, back, 5, 70_000)
assert (back.array[5:70_005] == host.array[100:70_100]).all() and not back.array[70_005:].any()
print("same" if "torch" not in sys.modules else "torch was loaded")
"""


@pytest.mark.parametrize("program", [WORDS, COPIES], ids=["words", "copies"])
def test_any_part_of_it_is_read_and_written(environment, runtime_dir, program):
    command = [sys.executable, "-c", program, str(runtime_dir)]
    child = child_environment(extra=environment)
    done = subprocess.run(
        command, env=child, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.stdout == "same\n", done.stderr
