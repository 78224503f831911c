"""A headless Chromium, driven over its debugging pipe: what a page logs, what it asks for, how it looks."""

import base64
import json
import os
import shutil
import subprocess
import threading
from contextlib import contextmanager

LIMIT = 120  # seconds
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-extensions",
         "--remote-debugging-pipe", "--host-resolver-rules=MAP * ~NOTFOUND")  # fmt: skip


def find():
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. `logs` are console messages, exceptions and refusals of its policy; `asked` are its requests."""

    def __init__(self, to, back):
        self.to, self.back, self.number, self.session = to, back, 0, None
        self.logs, self.asked, self.names = [], [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Log", "Runtime", "Network", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Return the answer to a command; what happens meanwhile is noted."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        os.write(self.to, json.dumps(command | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (message := self._next()).get("id") != self.number:
            self._note(message)
        assert "error" not in message, message
        return message["result"]

    def _next(self):
        parts = []
        while (byte := self.back.read(1)) != b"\0":
            assert byte, "the browser ended"
            parts.append(byte)
        return json.loads(b"".join(parts))

    def _note(self, message):
        name, found = message["method"], message["params"]
        self.names.append(name)
        if name in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.logs.append(json.dumps(found))
        if name == "Network.requestWillBeSent":
            self.asked.append(found["request"]["url"])

    def open(self, path, width=1280, height=900, *, dark=False):
        """Load a file and wait until all of it is there."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.names.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self.names:
            self._note(self._next())

    def value(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def screenshot(self, path):
        """Write the whole page as a PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def started(profile):
    """Yield a Browser with an empty profile in a folder."""
    to_read, to = os.pipe()
    back, back_write = os.pipe()
    # the pipes are 3 and 4 in the browser
    command = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
    args = ["bash", "-c", command, "bash", str(to_read), str(back_write), find(), *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(args, pass_fds=(to_read, back_write), stderr=subprocess.DEVNULL)
    os.close(to_read)
    os.close(back_write)
    watchdog = threading.Timer(LIMIT, process.kill)  # its pipe then ends, which is an error
    watchdog.start()
    try:
        with os.fdopen(back, "rb") as file:
            yield Browser(to, file)
    finally:
        watchdog.cancel()
        os.close(to)
        process.terminate()
        process.wait()
