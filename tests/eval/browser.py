"""A page in headless Chromium, used by a script as a person would."""

import html
import json
import re
import subprocess

OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
           "--window-size=1280,1600", "--virtual-time-budget=10000", "--dump-dom"]
WATCH = """<script>window.problems = [];
window.addEventListener('error', e => problems.push(String(e.message)));
document.addEventListener('securitypolicyviolation', e => problems.push(e.violatedDirective + ' ' + e.blockedURI));
</script></head>"""


def look(chromium: str, page, tmp_path, probe: str) -> dict:
    """Open a copy of the page with the probe in it; returns what the probe saw."""
    text = page.read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(text.replace("</head>", WATCH, 1).replace("</body>", probe, 1))
    command = [chromium, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", f"file://{probed}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in result.stderr, [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert 'data-ready="yes"' in result.stdout
    seen = re.search(r'data-seen="([^"]*)"', result.stdout)
    assert seen, "the page's script or the probe stopped"
    return json.loads(html.unescape(seen.group(1)))
