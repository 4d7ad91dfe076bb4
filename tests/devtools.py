"""Drives headless Chromium through the DevTools protocol: what a person does, what the page asked the network."""

import asyncio
import base64
import json
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
           "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
           "--mute-audio"]


class Page:
    """One tab. `requests` are the addresses that it asked for, `problems` its errors and what its policy refused."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._number, self._answers = socket, 0, dict[int, asyncio.Future]()
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told)
            elif told["method"] == "Network.requestWillBeSent":
                self.requests.append(told["params"]["request"]["url"])
            elif told["method"] == "Runtime.exceptionThrown":
                self.problems.append(told["params"]["exceptionDetails"].get("text", "exception"))
            elif told["method"] == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.problems.append(told["params"]["entry"]["text"])

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the protocol."""
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        told = await asyncio.wait_for(answer, 60)
        assert "error" not in told, f"{method}: {told['error']}"
        return told["result"]

    async def open(self, address: str) -> None:
        """Go there, watching network and errors."""
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            await self.send(f"{domain}.enable")
        await self.send("Page.navigate", url=address)

    async def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        told = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, script: str, seconds: float = 90.0) -> Any:
        """The expression's first value that is true. Fails with what the page shows when the time is over."""
        for _ in range(round(seconds * 10)):
            value = await self.run(f"(v => v instanceof Node ? true : v)({script})")
            if value:
                return value
            await asyncio.sleep(0.1)
        shown = await self.run("document.body.innerText")
        raise AssertionError(f"{script} was not true within {seconds:g} s; the page shows: {shown[:2000]}; {self.problems}")

    async def choose_file(self, selector: str, file: Path) -> None:
        """Give a file to the file input inside an element, as its dialogue would."""
        await self.until(f"document.querySelector('{selector} input[type=file]')")
        document = await self.send("DOM.getDocument")
        node = await self.send("DOM.querySelector", nodeId=document["root"]["nodeId"], selector=f"{selector} input[type=file]")
        await self.send("DOM.setFileInputFiles", files=[str(file)], nodeId=node["nodeId"])

    async def click(self, selector: str) -> None:
        """Click an element."""
        await self.until(f"document.querySelector({json.dumps(selector)})")
        await self.run(f"document.querySelector({json.dumps(selector)}).click()")

    async def screenshot(self, file: Path) -> None:
        """A PNG of what is seen."""
        told = await self.send("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(told["data"]))


@asynccontextmanager
async def browser(chromium: str, folder: Path, width: int = 1280, height: int = 1000):
    """A page of a fresh browser, whose profile is in the folder."""
    command = [chromium, *OPTIONS, f"--window-size={width},{height}", f"--user-data-dir={folder}", "--remote-debugging-port=0",
               "about:blank"]
    with (folder.parent / "chromium.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
    try:
        port = await _port(folder / "DevToolsActivePort", process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = await answer.json(content_type=None)
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                yield page
                page._reader.cancel()
    finally:
        process.terminate()
        process.wait(20)


async def _port(file: Path, process: subprocess.Popen) -> int:
    for _ in range(300):
        if file.exists() and file.read_text().strip():
            return int(file.read_text().split()[0])
        assert process.poll() is None, "Chromium ended at once"
        await asyncio.sleep(0.1)
    raise AssertionError("Chromium did not say where it listens")
