"""Drives `switchkd demo BUNDLE` in headless Chromium: uploads a picture, asks, waits, saves demo.png beside this file.

Needs Debian's `chromium` and `pip install playwright` (in any environment; no browser is downloaded). Ends with an
error where the page reports one, asks anything beyond localhost, or does not fit a phone.
"""

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Without these, Chromium asks its makers' servers for updates at every start.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"width": 1200, "height": 880}
PHONE = {"width": 390, "height": 844}


def main() -> None:
    """Start the demo, take the pictures, stop the demo."""
    args = parse_arguments()
    picture, question = args.picture, args.question
    if picture is None:
        folder = args.bundle / "examples"
        example = json.loads((folder / "examples.json").read_text(encoding="utf-8"))[args.example]
        picture, question = folder / example["picture"], question or example["question"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [args.switchkd, "demo", args.bundle, "--port", str(port), "--no-open"]
    if args.precision:
        command += ["--precision", args.precision]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        try:
            assert demo.stdout is not None
            line = demo.stdout.readline()
            found = re.search(r"http://\S+", line)
            if not found:
                sys.exit(f"the demo did not start: {line}")
            drive(found[0], picture, question or "What is in the picture?", args)
        finally:
            demo.terminate()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    installed = ROOT / ".venv" / "bin" / "switchkd"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--picture", type=Path, help="default: an example of the bundle")
    parser.add_argument("--question")
    parser.add_argument("--example", type=int, default=0, help="number of the bundle's example (default: 0)")
    parser.add_argument("--precision")
    parser.add_argument("--output", type=Path, default=HERE / "demo.png")
    parser.add_argument("--phone", type=Path, help="also save the page at a phone's width")
    parser.add_argument("--switchkd", default=str(installed) if installed.exists() else "switchkd")
    parser.add_argument("--chromium", default=shutil.which("chromium") or "/usr/bin/chromium")
    return parser.parse_args()


def drive(url: str, picture: Path, question: str, args: argparse.Namespace) -> None:
    """Ask one question as a person would, save what they see, and complain about what they should not see."""
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=FLAGS)
        page = browser.new_page(viewport=DESKTOP, device_scale_factor=2)
        page.on("console", lambda said: complaints.extend([f"console: {said.text}"] if said.type == "error" else []))
        page.on("pageerror", lambda error: complaints.append(f"script: {error}"))
        page.on("request", lambda request: complaints.extend(beyond(url, request.url)))
        page.goto(url)
        page.locator("input[type=file]").first.set_input_files(picture)
        expect(page.get_by_alt_text("The picture to ask about")).to_be_visible()
        page.get_by_label("Question").fill(question)
        page.get_by_role("button", name="Ask", exact=True).click()
        answer = wait_for_answer(page)
        page.screenshot(path=args.output)
        page.set_viewport_size(PHONE)
        page.wait_for_timeout(500)
        overhang = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if overhang > 0:
            complaints.append(f"the page is {overhang} pixels wider than a phone")
        if args.phone:
            page.screenshot(path=args.phone, full_page=True)
        browser.close()
    print(f"{question} -> {answer}\nsaved {args.output}")  # noqa: T201
    if complaints:
        sys.exit("\n".join(complaints))


def beyond(url: str, requested: str) -> list[str]:
    """Complain about a request that leaves the demo."""
    return [] if requested.startswith((url, "data:", "blob:")) else [f"request: {requested}"]


def wait_for_answer(page: Page) -> str:
    """Wait until the answer has stopped growing, and return it."""
    box = page.get_by_label("Answer")
    expect(box).not_to_have_value("", timeout=60_000)
    text = ""
    while text != box.input_value():
        text = box.input_value()
        page.wait_for_timeout(1_000)
    return text


if __name__ == "__main__":
    main()
