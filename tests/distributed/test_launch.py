"""Started processes end together, whatever becomes of one, and say what it was; ranks meet, or are told why not."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from domainnorm.distributed import launch, rank, set_progress
from domainnorm.distributed.rendezvous import check_url, ranks_of_environment
from domainnorm.distributed.watch import timeout
from domainnorm.errors import Stopped, UserError


def no_space(_):
    """On rank 1; the other one waits for it."""
    if rank() == 1:
        raise OSError(errno.ENOSPC, "No space left on device")
    dist.barrier()


def mistake(_):
    if rank() == 1:
        raise UserError("what the user did")
    dist.barrier()


def killed(_):
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def stops(_):
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def hangs(_):
    set_progress(rank() == 0)  # rank 1 is not as far
    if rank() == 1:
        time.sleep(100)
    dist.barrier()


def stopped_alone(_):
    if rank() == 1:
        raise Stopped(signal.SIGTERM)
    time.sleep(100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (no_space, mp.ProcessRaisedException, r"rank 1 \(process \d+ on .*No space left on device"),
        (mistake, UserError, "^what the user did$"),
        (killed, UserError, r"^rank 1 \(process \d+ on .*\) was ended by SIGKILL; is memory short\?$"),
        (stops, UserError, r"^rank 1 \(process \d+ on .*\) has not answered for 10 s \(DOMAINNORM_TIMEOUT\)"),
        (hangs, UserError, r"^rank 1 \(process \d+ on .*\) hangs: the others have waited for it for 10 s"),
        (stopped_alone, Stopped, "143"),
    ],
)
def test_what_ended_one_is_told_and_ends_all(monkeypatch, function, kind, message):
    monkeypatch.setenv("DOMAINNORM_TIMEOUT", "10")
    with pytest.raises(kind) as error:
        launch(function, (None,), num_processes=2)
    assert re.search(message, str(error.value), re.S)


WAITING = """
    import os, signal, sys, time
    from domainnorm.distributed import launch, rank

    def work(folder):
        open(os.path.join(folder, f"{rank()}-{os.getpid()}"), "w").close()
        while True:
            time.sleep(0.1)

    if __name__ == "__main__":
        launch(work, (sys.argv[1],), num_processes=2)
"""


def wait_until(condition, seconds=100):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_ranks_end_with_the_process_that_started_them(tmp_path, number):
    """A signal that it alone gets."""
    (tmp_path / "script.py").write_text(textwrap.dedent(WAITING))
    (tmp_path / "ranks").mkdir()
    words = [sys.executable, tmp_path / "script.py", tmp_path / "ranks"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: len(list((tmp_path / "ranks").iterdir())) == 2)
    pids = [int(path.name.split("-")[1]) for path in (tmp_path / "ranks").iterdir()]
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    wait_until(lambda: not any(map(lives, pids)), 20)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in output


# --- where ranks meet -----------------------------------------------------------------------------------------------

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}


def test_ranks_of_another_launcher(environment):
    assert ranks_of_environment() is None
    environment(RANK="0", WORLD_SIZE="1")
    assert ranks_of_environment() is None
    environment(RANK="1", WORLD_SIZE="2", **MEETING)
    assert ranks_of_environment() == (1, 2)
    with pytest.raises(UserError, match="--num-gpus 2: another launcher has started 2 processes"):
        launch(no_space, (None,), num_processes=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MEETING}, "take a number below WORLD_SIZE"),
        ({"RANK": "a", "WORLD_SIZE": "2", **MEETING}, "take a number below WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MEETING, "MASTER_PORT": "99999"}, "and a port"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MEETING, "MASTER_ADDR": "no such host"}, "MASTER_ADDR: the host"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "each of these processes would train by itself"),
    ],
)
def test_an_environment_in_which_ranks_cannot_meet(environment, values, message):
    environment(**values)
    with pytest.raises(UserError, match=message):
        launch(no_space, (None,))


@pytest.mark.parametrize(
    "url",
    ["", "tcp://", "tcp://localhost", "tcp://localhost:99999", "tcp://localhost:x", "http://a:1", "localhost:29500"],
)
def test_urls_that_are_none(url):
    with pytest.raises(UserError, match="--dist-url takes tcp://HOST:PORT"):
        check_url(url)
    check_url("tcp://localhost:29500")
    with pytest.raises(UserError, match=r"the host 'nowhere\.invalid' is not known"):
        check_url("tcp://nowhere.invalid:29500")


@pytest.mark.slow
def test_a_port_in_use_and_a_machine_that_does_not_come(monkeypatch, capfd):
    monkeypatch.setenv("DOMAINNORM_TIMEOUT", "5")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"tcp://127\.0\.0\.1:{port}: the port is in use by another program"):
            launch(no_space, (None,), num_machines=2, machine_rank=0, dist_url=f"tcp://127.0.0.1:{port}")
    for machine in (0, 1):
        with pytest.raises(UserError, match=r"the 2 ranks did not all come within 15 s"):
            launch(no_space, (None,), num_machines=2, machine_rank=machine, dist_url=f"tcp://127.0.0.1:{port}")
    output = capfd.readouterr()
    assert f"waiting at tcp://127.0.0.1:{port} for the other ranks" in output.out
    assert output.err == ""


def test_seconds_to_wait(monkeypatch):
    monkeypatch.delenv("DOMAINNORM_TIMEOUT", raising=False)
    assert timeout() == 300
    for text in ("0", "-1", "soon", "nan", "inf"):
        monkeypatch.setenv("DOMAINNORM_TIMEOUT", text)
        with pytest.raises(UserError, match="DOMAINNORM_TIMEOUT takes a number of seconds above 0"):
            timeout()
