"""Drives the page of `basicsr demo` in a headless browser, as a visitor would: `python scripts/try_demo.py OUT`.

Needs the extra `demo`, the package playwright, and a Chromium of the system (Debian: apt-get install chromium).
Uploads a photograph of `assets/quickstart`, moves both sliders, compares the pictures that it sees before and after,
asks for too much, and does it all again as narrow as a phone. Screenshots go to the folder OUT. Exit code 0 if
everything changed that had to, nothing else did, and the page asked for nothing outside this machine.
"""

import argparse
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPH = ROOT / 'assets/quickstart/val/kodim23.png'
PORT = 7871
URL = f'http://127.0.0.1:{PORT}'
PATIENCE_MS = 300_000  # of a busy machine


def sources(page: Page) -> dict[str, list[str]]:
    """The addresses of the pictures that are shown."""
    return {
        name: [image.get_attribute('src') or '' for image in page.locator(f'#{name} img').all()]
        for name in ('comparison', 'experts')
    }


def settle(page: Page, before: dict | None = None) -> dict:
    """Wait until the pictures are others than `before` and stay."""
    start = time.time()
    last, since = sources(page), time.time()
    while time.time() - start < PATIENCE_MS / 1000:
        page.wait_for_timeout(500)
        now = sources(page)
        if now != last:
            last, since = now, time.time()
        if last != before and len(last['comparison']) == 2 and time.time() - since > 3:
            return last
    raise SystemExit(f'The page did not change within {PATIENCE_MS / 1000:.0f} s.')


def move(page: Page, name: str, value: float) -> None:
    """Set a slider by the number beside it."""
    field = page.locator(f'#{name} input[type=number]')
    field.fill(str(value))
    field.press('Enter')


def visit(page: Page, out: Path, device: str) -> None:
    """Upload, both sliders, too much, the original."""
    page.goto(URL)
    first = settle(page)
    page.screenshot(path=out / f'{device}_1_first.png', full_page=True)
    assert 'PSNR' in page.locator('#numbers').inner_text()
    move(page, 'factor', 2)
    other = settle(page, first)
    move(page, 'cost', 2)
    cheap = settle(page, other)
    assert cheap['experts'] != other['experts'], 'another cost weight is another expert map'
    page.screenshot(path=out / f'{device}_2_sliders.png', full_page=True)
    page.locator('#picture button[aria-label="Clear"], #picture button[aria-label="Remove Image"]').first.click()
    page.locator('#picture input[type=file]').set_input_files(out / 'parrot.png')
    uploaded = settle(page, cheap)
    assert 'PSNR' not in page.locator('#numbers').inner_text(), 'the original of the example is gone'
    page.screenshot(path=out / f'{device}_3_upload.png', full_page=True)
    move(page, 'factor', 12)
    message = page.get_by_text('this page stops at')
    message.wait_for(timeout=PATIENCE_MS)
    page.screenshot(path=out / f'{device}_4_too_large.png')
    assert sources(page) == uploaded, 'what was there stays'
    move(page, 'factor', 2)
    settled = settle(page, uploaded)
    page.get_by_text('How close is it to the original?').click()
    page.get_by_role('button', name='Shrink').click()
    settle(page, settled)
    assert 'PSNR' in page.locator('#numbers').inner_text()
    page.screenshot(path=out / f'{device}_5_measured.png', full_page=True)
    with page.expect_download() as download:
        page.locator('#download').click()
    download.value.save_as(out / f'{device}_{download.value.suggested_filename}')
    wide = page.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth')
    assert wide <= 0, f'the page is {wide} pixels wider than the screen'


def main() -> int:
    """Start the command, visit it on two screens, and stop it."""
    parser = argparse.ArgumentParser(description='Drives the page of `basicsr demo` in a headless browser.')
    parser.add_argument('out', type=Path, help='folder for the screenshots')
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    Image.open(PHOTOGRAPH).crop((64, 0, 320, 256)).save(out / 'parrot.png')  # x12 of it is more than the page makes
    server = subprocess.Popen([sys.executable, '-m', 'moeisr_basicsr', 'demo', '--port', str(PORT)])
    asked: set[str] = set()
    try:
        wait_for(server)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
            for device, width, height in (('phone', 390, 844), ('desktop', 1280, 900)):
                page = browser.new_page(viewport={'width': width, 'height': height})
                page.set_default_timeout(PATIENCE_MS)
                page.on('request', lambda request: asked.add(request.url))
                visit(page, out, device)
                page.close()
                print(f'{device}: passed')
            browser.close()
    finally:
        server.terminate()
        server.wait()
    elsewhere = sorted(url for url in asked if not url.startswith((URL, 'data:', 'blob:')))
    print(f'{len(asked)} addresses asked for, outside this machine: {elsewhere or "none"}')
    return 1 if elsewhere else 0


def wait_for(server: subprocess.Popen) -> None:
    """Until the page answers."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(URL, timeout=60).close()
            return
        except OSError:
            time.sleep(1)
    raise SystemExit('basicsr demo did not start.')


if __name__ == '__main__':
    sys.exit(main())
