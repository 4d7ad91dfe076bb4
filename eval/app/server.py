"""Serves the page: on this machine alone unless told otherwise, with nothing fetched from elsewhere and nothing left behind."""

import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers_lab.errors import ConfigError, WeightsMissing

from .actions import Limits
from .loaded import LoadedModel

LOOPBACK = ("127.0.0.1", "localhost", "::1")
FONT, MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]      # the machine's own: none is fetched
WAITING = 20               # people who may wait for their turn
POLICY = (      # the browser itself refuses what is not of this server; Gradio makes its HTML by evaluating templates
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "font-src 'self' data:; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'")
HEADERS = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer"),
           (b"x-content-type-options", b"nosniff")]
# Parts of Gradio's server that this page does not need: they fetch addresses that a client names, run programs on files, or
# tell what others did.
REFUSED = re.compile(
    r"/(proxy=|file[=/]\s*[a-z][a-z0-9+.-]*:|process_recording|vibe|runs\b|run-history|dev/|monitoring|profiling|custom_component|"
    r"deep_link)", re.IGNORECASE)


def serve(
    models: Sequence[LoadedModel], limits: Limits, host: str = "127.0.0.1", port: int = 7860, keep: float = 3600.0,
    ready: Callable[[str], Any] = print,
) -> None:
    """Serve the page until SIGINT (KeyboardInterrupt) or SIGTERM (SystemExit) ends it. ready: called with its address.

    keep: seconds for which files that were dropped or made are kept; all are deleted in the end. Raises WeightsMissing without
    Gradio, ConfigError on a host or port that cannot be used.
    """
    check_gradio()
    check_port(host, port)
    with tempfile.TemporaryDirectory(prefix="toklab-app-") as root, _environment(root), _terminated():
        gr = import_gradio()
        from starlette.middleware import Middleware

        from .page import build_page

        page = build_page(models, limits, keep)
        page.queue(max_size=WAITING, default_concurrency_limit=1)
        hosts = {host, *LOOPBACK} if host in LOOPBACK else None
        try:
            page.launch(
                server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, inbrowser=False,
                show_error=False, allowed_paths=[], blocked_paths=blocked_paths(root), enable_monitoring=False, ssr_mode=False,
                pwa=False, mcp_server=False, run_history=False, footer_links=[], strict_cors=True,
                max_file_size=round(limits.megabytes * 1e6), theme=gr.themes.Default(font=FONT, font_mono=MONO),
                css=(files("tokenizers_lab.eval") / "app.css").read_text(encoding="utf-8"),
                app_kwargs={"middleware": [Middleware(Guard, hosts=hosts)], "docs_url": None, "redoc_url": None,
                            "openapi_url": None})
            name = f"[{host}]" if ":" in host else host
            ready(f"http://{name}:{port}/")
            _wait()
        finally:
            page.close(verbose=False)


def check_gradio() -> None:
    """Raise WeightsMissing that says how to install Gradio 6 where it is not here. It is not imported yet."""
    try:
        found = version("gradio")
    except PackageNotFoundError as error:
        raise WeightsMissing("toklab app needs the package gradio: pip install 'tokenizers-lab[app]'") from error
    if int(found.split(".")[0]) < 6:
        raise WeightsMissing(f"toklab app needs gradio 6 or newer, not {found}: pip install 'tokenizers-lab[app]'")


def import_gradio() -> Any:
    """Gradio, made to fetch nothing: what a client names as an address it would load, for anyone who asks."""
    import gradio
    from gradio import processing_utils

    for fetch in ("ssrf_protected_download", "async_ssrf_protected_download"):
        setattr(processing_utils, fetch, _refuse_address)
    return gradio


def _refuse_address(*args: Any, **kwargs: Any) -> str:
    raise ValueError("addresses are not fetched: drop a file")


def check_port(host: str, port: int) -> None:
    """Raise ConfigError if nothing can be served there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family[0], family[1]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(family[4])
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"http://{host}:{port} cannot be served ({reason}): give another --host or --port") from error


def blocked_paths(root: str) -> list[str]:
    """Folders of which nothing is served, whatever Gradio would allow: the package's, this one, the user's. root: of uploads."""
    import tokenizers_lab

    folders = {Path(tokenizers_lab.__file__).resolve().parents[1], Path.cwd().resolve(), Path.home().resolve()}
    uploads = Path(root).resolve()
    return [str(folder) for folder in folders if not uploads.is_relative_to(folder)]


class Guard:
    """ASGI middleware: answers only requests to this machine's names, refuses REFUSED, and sends HEADERS with every answer."""

    def __init__(self, app: Any, hosts: set[str] | None):
        """hosts: names by which the server may be called; none: any. Else a page elsewhere could name its own address so."""
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (self.hosts is not None and host_of(scope["headers"]) not in self.hosts) or REFUSED.search(scope["path"]):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain"), *HEADERS]})
            await send({"type": "http.response.body", "body": b"not served here"})
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        await self.app(scope, receive, with_headers)


def host_of(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """The host that a request asks for, without its port."""
    value = next((value for name, value in headers if name.lower() == b"host"), b"").decode("latin-1").lower()
    return re.sub(r":\d+$", "", value).strip("[]")


@contextmanager
def _environment(root: str) -> Iterator[None]:
    """Gradio's settings by environment: its folder of files, no reports home, and none that the user's shell happens to hold."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_TEMP_DIR": root, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    for name in ("no_proxy", "NO_PROXY"):      # Gradio asks its own server whether it is there
        os.environ[name] = ",".join(filter(None, [os.environ.get(name, ""), *LOOPBACK]))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends the server as Ctrl-C does, so that its files are deleted."""
    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait() -> None:
    """Until a signal."""
    while True:
        time.sleep(3600)
