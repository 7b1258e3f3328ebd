"""Pages in headless Chromium, where there is one."""

import json
import re
import shutil
import subprocess
import tempfile


def overflow(page, width):
    """By how many pixels a page is wider than its window, in headless Chromium; 0 where there is none."""
    chromium = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if chromium is None:
        return 0
    frame = page.with_name("frame.html")  # a page of its own, for reports allow no scripts
    script = """const f = document.getElementById("f"), d = () => f.contentDocument.documentElement;
        f.onload = () => { document.title = "over " + (d().scrollWidth - d().clientWidth); }; f.srcdoc = """
    text = json.dumps(page.read_text()).replace("</", "<\\/")
    frame.write_text(
        f"<title></title><iframe id=f style='width:{width}px;border:0'></iframe><script>{script}{text}</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [chromium, *flags, f"--user-data-dir={profile}", frame.as_uri()]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return int(re.search(r"<title>over (-?\d+)</title>", dom)[1])
