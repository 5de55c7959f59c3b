"""The questions of install_agent.py at a real terminal (a pty), and without one."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.home import HOST, TOKEN, TOKEN_ID
from tests.harness import OTHER_WALLET, ROOT, WALLET, WG_KEY

# The part of install_agent.py from the command line to the answers, on a machine whose files are
# those of a directory.
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
from dataclasses import replace
from pathlib import Path
import install_agent
from install_agent import *
directory, registered = Path(sys.argv[2]), sys.argv[3] == "registered"
files = {path: read_file(directory / path.name, 1 << 16) for path in (ENV, WG_CONF)}
files = {path: found for path, found in files.items() if found}
data = DataDir("/var/lib/openinfra", 0o700, 0, True, True, True, registered)
url = (directory / "url").read_text() if (directory / "url").exists() else ""
facts = replace(read_facts(), files=files, data=data, manifest=Manifest(url=url))
def install(args):
    answers = settle_answers(args, facts, check_flags(args))
    print("ANSWERS", answers, "token", {TOKEN}.get(answers.token, answers.token), flush=True)
    return 0
install_agent.install = install
install_agent.take_lock = lambda: None
os.geteuid = lambda: 0
sys.exit(main(sys.argv[4:]))
""".replace("{TOKEN}", repr({TOKEN: "the invite"}))
ENV = f"""INVITE_TOKEN=oi1_{TOKEN_ID}_used
SOLANA_PAYOUT_PUBKEY={WALLET}
CONTROL_PLANE=10.77.0.1:9092
DATA_DIR=/var/lib/openinfra
"""
CONF = f"""[Interface]
Address = 10.77.0.42/32
PrivateKey = {WG_KEY}
[Peer]
PublicKey = {WG_KEY}
Endpoint = {HOST}:51820
"""
URL = f"https://{HOST}/dist/openinfra-agent-linux-x86_64"
HIDDEN = "Invite token (not shown): "


def make_argv(directory: Path, *arguments: str, registered: bool = False) -> list[str]:
    state = "registered" if registered else "new"
    argv = ["/usr/bin/python3", "-SI", "-c", CHILD, str(ROOT), str(directory), state]
    return [*argv, *arguments]


def lay(directory: Path, env: str = ENV, conf: str = CONF) -> None:
    """What an earlier run left."""
    (directory / "agent.env").write_text(env)
    (directory / "openinfra.conf").write_text(conf)
    (directory / "url").write_text(URL)


def without_terminal(argv: list[str], stdin: bytes = b"") -> tuple[int, str]:
    done = subprocess.run(
        argv, input=stdin, capture_output=True, start_new_session=True, timeout=60, check=False
    )
    said = (done.stdout + done.stderr).decode()
    assert "Traceback" not in said, said
    return done.returncode, said


def at_terminal(argv: list[str], *typed: str) -> tuple[int, str]:
    """Type each answer once something is asked; gives back the exit code and the screen."""
    child, screen = pty.fork()
    if child == 0:
        # As a person's shell starts it; what runs in the background of one ignores Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execv(argv[0], argv)
    seen, answers, until = b"", list(typed), time.monotonic() + 60
    try:
        while time.monotonic() < until:
            if select.select([screen], [], [], 0.2)[0]:
                try:
                    more = os.read(screen, 4096)
                except OSError:
                    break
                seen += more
            elif answers and seen.endswith(b": "):
                os.write(screen, answers.pop(0).encode())
                seen += b"<typed>"
    finally:
        os.close(screen)
    _, status = os.waitpid(child, 0)
    text = seen.decode()
    assert "Traceback" not in text, text
    assert not answers, f"never asked for {answers}: {text}"
    return os.waitstatus_to_exitcode(status), text


def test_without_a_terminal_all_missing_flags_are_named(tmp_path: Path) -> None:
    code, said = without_terminal(make_argv(tmp_path))
    flags = "--hostname --token-file --wallet --wg-endpoint --wg-public-key --wg-address"
    assert (code, f"these are missing: {flags}; give them" in said) == (2, True), said
    code, said = without_terminal(make_argv(tmp_path, f"--wallet={WALLET}", "--dry-run"))
    assert code == 2
    assert "--hostname --wg-endpoint --wg-public-key --wg-address;" in said


def test_flags_and_an_invite_on_stdin(tmp_path: Path) -> None:
    flags = [f"--hostname={HOST}", f"--wallet={WALLET}", f"--wg-endpoint={HOST}:51820"]
    flags += [f"--wg-public-key={WG_KEY}", "--wg-address=10.77.0.42/32", "--token-file=-"]
    code, said = without_terminal(make_argv(tmp_path, *flags), TOKEN.encode() + b"\n")
    assert code == 0, said
    assert "token the invite" in said
    assert f"url='{URL}'" in said
    assert "wg_address='10.77.0.42'" in said
    assert "control_plane='10.77.0.1:9092'" in said
    assert TOKEN not in said
    code, said = without_terminal(make_argv(tmp_path, *flags), TOKEN[:-1].encode())
    assert (code, f"was mistyped (invite {TOKEN_ID})" in said) == (2, True)


def test_all_is_asked_for_in_the_documents_order(tmp_path: Path) -> None:
    typed = [f"{HOST}\n", "\n", f"{TOKEN}\n", f"{WALLET}\n", "\n", f"{WG_KEY}\n", "10.77.0.42\n"]
    code, screen = at_terminal(make_argv(tmp_path), *typed)
    assert code == 0, screen
    assert re.findall(r"([A-Z][^\n]*: )<typed>", screen) == [
        "Control plane public hostname: ",
        "Control plane gRPC endpoint [10.77.0.1:9092]: ",
        HIDDEN,
        "Solana payout pubkey: ",
        f"Control plane WireGuard endpoint [{HOST}:51820]: ",
        "Control plane WireGuard public key: ",
        "Your assigned WireGuard IP: ",
    ]
    assert "token the invite" in screen
    assert f"wg_endpoint='{HOST}:51820'" in screen
    assert TOKEN not in screen


def test_a_wrong_answer_is_asked_for_again(tmp_path: Path) -> None:
    flags = [f"--hostname={HOST}", f"--wg-public-key={WG_KEY}", f"--wg-endpoint={HOST}:51820"]
    typed = ["192.0.2.1:1\n", "\n", f"{TOKEN[:-1]}\n", "\n", f"{TOKEN}\n", "\n", "0OIl\n"]
    typed += [f"{WALLET}\n", "10.77.0.1\n", "10.78.0.1\n", "10.77.0.42\n"]
    code, screen = at_terminal(make_argv(tmp_path, *flags), *typed)
    assert code == 0, screen
    said = [line for line in screen.splitlines() if "install_agent: " in line]
    reasons = ["outside the tunnel", "mistyped", "no invite", "earns nothing", "not a Solana"]
    reasons += ["no host's address", "outside the tunnel's"]
    assert len(said) == len(reasons)
    assert all(reason in line for reason, line in zip(reasons, said, strict=True)), said


@pytest.mark.parametrize("key", ["\x03", "\x04"])
@pytest.mark.parametrize("at", [0, 2])
def test_ctrl_c_and_ctrl_d_end_it_in_one_line(tmp_path: Path, key: str, at: int) -> None:
    typed = [*[f"{HOST}\n", "\n"][:at], key]
    code, screen = at_terminal(make_argv(tmp_path), *typed)
    assert code == 130, screen
    assert screen.rstrip().endswith("interrupted; the same command goes on from here")


def test_what_is_known_is_not_asked_for(tmp_path: Path) -> None:
    lay(tmp_path)
    for code, said in (
        without_terminal(make_argv(tmp_path)),
        at_terminal(make_argv(tmp_path)),
        without_terminal(make_argv(tmp_path, f"--wallet={OTHER_WALLET}")),
    ):
        assert code == 0, said
        assert f"token oi1_{TOKEN_ID}_used" in said
        assert f"url='{URL}'" in said
    assert f"wallet='{OTHER_WALLET}'" in said
    fresh = make_argv(tmp_path, "--token-file=-")
    assert "token the invite" in without_terminal(fresh, TOKEN.encode())[1]
    moved = without_terminal(make_argv(tmp_path, "--hostname=cp2.coledex.com"))[1]
    assert f"url='{URL.replace('cp.', 'cp2.')}'" in moved


def test_a_host_that_has_its_identity_needs_no_invite(tmp_path: Path) -> None:
    lay(tmp_path, env=ENV.replace(f"oi1_{TOKEN_ID}_used", ""))
    code, said = without_terminal(make_argv(tmp_path))
    assert (code, "these are missing: --token-file;" in said) == (2, True)
    code, said = without_terminal(make_argv(tmp_path, registered=True))
    assert code == 0, said
    assert said.rstrip().endswith("token")


def test_a_fresh_invite_is_asked_for(tmp_path: Path) -> None:
    """Also of a host that has its identity; of an unspent invite too."""
    for env in (ENV, ENV.replace(f"oi1_{TOKEN_ID}_used", TOKEN)):
        lay(tmp_path, env=env)
        argv = make_argv(tmp_path, "--new-invite", registered=True)
        code, said = without_terminal(argv)
        assert (code, "these are missing: --token-file;" in said) == (2, True)
        code, said = at_terminal(argv, f"{TOKEN}\n")
        assert (code, "token the invite" in said, "is_new_host=True" in said) == (0, True, True)
        code, said = without_terminal([*argv, "--token-file=-"], TOKEN.encode())
        assert (code, "token the invite" in said) == (0, True)
    code, said = without_terminal(make_argv(tmp_path, "--uninstall", "--new-key"))
    assert (code, "--uninstall goes with neither" in said) == (2, True)


def test_what_is_wrong_on_disk_is_said_and_asked_for(tmp_path: Path) -> None:
    lay(tmp_path, ENV.replace(WALLET, "x"), CONF.replace("10.77.0.42", "10.99.0.42"))
    code, said = without_terminal(make_argv(tmp_path))
    assert code == 2
    assert "what is on disk is wrong: SOLANA_PAYOUT_PUBKEY is not a Solana address" in said
    assert "these are missing: --wallet --wg-address;" in said
    code, screen = at_terminal(make_argv(tmp_path), f"{WALLET}\n", "10.77.0.42\n")
    assert code == 0, screen


def test_the_agents_url_needs_no_hostname(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://mirror.example.org/x/openinfra-agent-linux-x86_64"
    lay(tmp_path)
    (tmp_path / "url").unlink()
    assert without_terminal(make_argv(tmp_path))[0] == 2
    monkeypatch.setenv("OPENINFRA_AGENT_URL", url)
    code, said = without_terminal(make_argv(tmp_path))
    assert (code, f"url='{url}'" in said) == (0, True), said
