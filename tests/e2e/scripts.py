"""How the product's scripts are run in a machine, what they say there, and how they are killed."""

from __future__ import annotations

import shlex
import time

from tests.e2e.vm import Done, Vm

# Runs in the machine: ends the script, and its children or not, some time after a step began.
KILLER = """
import os, signal, subprocess, sys, time
step, delay_s, whole, *argv = sys.argv[1:]
process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True)
for line in process.stderr:
    if step in line:
        time.sleep(float(delay_s))
        (os.killpg if whole == "1" else os.kill)(process.pid, signal.SIGKILL)
        break
print(process.wait())
"""
KILLER_PATH = "/root/killer.py"


def said(done: Done) -> str:
    """What a script told the person."""
    return done.stderr.decode(errors="replace")


def run_script(vm: Vm, script: str, *arguments: str, timeout_s: float, **environment: str) -> Done:
    """Run a script without a terminal, and print how that went."""
    env = [f"{name}={value}" for name, value in environment.items()]
    started = time.monotonic()
    done = vm.exec(["env", *env, script, *arguments], timeout_s=timeout_s)
    took_s = time.monotonic() - started
    shown = shlex.join([*env, script.rpartition("/")[2], *arguments])
    print(f"{shown}: {done.code} in {took_s:.1f} s\n{done.text}{said(done)}")
    return done


def run_killed(vm: Vm, step: str, delay_s: float, whole: str, *argv: str, timeout_s: float) -> str:
    """Run a script that KILLER ends; the code with which it ended, -9 unless it was over before."""
    vm.put(KILLER.encode(), KILLER_PATH)
    argv = ("python3", KILLER_PATH, step, str(delay_s), whole, *argv)
    return vm.exec(argv, timeout_s=timeout_s).text.strip().splitlines()[-1]


def wait_table(vm: Vm, name: str) -> float:
    """Wait until an nft table of family inet is there; how long that took."""
    started = time.monotonic()
    vm.sh(f"until nft list table inet {name} > /dev/null 2>&1; do sleep 0.1; done")
    return time.monotonic() - started
