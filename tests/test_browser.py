"""The page as people see it: JupyterLab and the HTML export in Debian's Chromium, headless. Skips
where there is none."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest

from conftest import NOTEBOOK, ROOT, cells_with_tag, committed

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.skipif(not CHROMIUM, reason="needs Debian's package chromium"),
              pytest.mark.long, pytest.mark.xdist_group("browser")]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
SETTINGS = {  # all cells stay in the page, also those that are scrolled away
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


CONNECTED_KERNEL = """async () => {
    const kernel = () => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
    const ready = () => kernel()?.connectionStatus === 'connected' && kernel().status === 'idle';
    for (let tries = 0; !ready(); tries++) {
        if (tries > 600) throw new Error('the kernel is not connected after two minutes');
        await new Promise(done => setTimeout(done, 200));
    }
    await kernel().info;
}"""


@pytest.fixture(scope="module")
def browser():
    engine = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with engine.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab server on a copy of the notebook; all that it writes stays in a
    folder of its own."""
    folder = tmp_path_factory.mktemp("lab")
    # without outputs, so that what the page shows was made here
    bare = nbformat.read(NOTEBOOK, as_version=4)
    for cell in bare.cells:
        cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
    nbformat.write(bare, folder / NOTEBOOK.name)
    shutil.copytree(ROOT / "checkpoints", folder / "checkpoints")
    small = """config = GPTConfig(vocab_size=257, context_length=64, n_layer=2, n_head=2, n_embd=32)
model = GPT(config).eval()
with torch.no_grad():
    model.token_embedding.weight.normal_(std=0.3)
small_panel = GenerationPanel(model, build_tokenizer([]), "def")
show_panel(small_panel.box, "")"""
    cells = [nbformat.v4.new_code_cell("\n".join(cells_with_tag("define")),
                                       metadata={"jupyter": {"source_hidden": True}}),
                                       nbformat.v4.new_code_cell(small)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells,
                                            metadata=json.loads(
                                                NOTEBOOK.read_text(encoding="utf-8"))["metadata"]),
                                                folder / "panel.ipynb")
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
    for name, values in SETTINGS.items():
        path = folder / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    environment = {**os.environ, "GPT_PRESET": "smoke", "HF_HUB_OFFLINE": "1",
                   "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
                   **{name: str(folder / "jupyter" / name)
                      for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR",
                                   "JUPYTERLAB_WORKSPACES_DIR")}}
    # conftest's choice; here the figures are to be seen
    environment.pop("MPLBACKEND", None)
    environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + environment["PATH"]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}",
               "--IdentityProvider.token=", "--allow-root", "--LabApp.expose_app_in_browser=True",
               "--JupyterNotebookApp.expose_app_in_browser=True"]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail((folder / "server.log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page(browser, lab):
    """The notebook in JupyterLab, run to its end with the smoke preset."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{lab}/lab/tree/{NOTEBOOK.name}")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=90_000)
    # what is run before that asks which kernel to take, or does nothing
    page.evaluate(CONNECTED_KERNEL)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    # the kernel is new; a restart would ask back in a dialog
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    # the last line: a cell that failed would end the run before it
    page.get_by_text("all 17 solutions are right").wait_for(state="attached", timeout=600_000)
    yield page
    page.close()


def until(page, condition, action=None, seconds=30):
    """Waits until condition() holds; action() is done again before each look."""
    for _ in range(int(seconds * 5)):
        if action:
            action()
        page.wait_for_timeout(200)
        if condition():
            return True
    return False


def press(page, handle, key):
    handle.focus()
    page.keyboard.press(key)


def type_into(field, text):
    field.fill(text)
    field.press("Enter")


def output_of(page, source):
    """The output area of the code cell whose source holds these words, scrolled into view:
    JupyterLab fills cells as they are reached."""
    cell = page.locator(".jp-CodeCell").filter(
        has=page.locator(".jp-InputArea-editor", has_text=source)).last
    cell.scroll_into_view_if_needed()
    return cell.locator(".jp-OutputArea")


def test_the_bars_move_with_a_slider(page):
    panel = output_of(page, "generation_panel = GenerationPanel")
    bars = panel.locator(".gpt-bars")
    bars.scroll_into_view_if_needed()
    before = bars.inner_text()
    handle = panel.locator(".noUi-handle").first
    assert until(page, lambda: panel.locator(".gpt-bars").inner_text() != before,
                 lambda: press(page, handle, "ArrowLeft"))


def test_a_text_streams_in_while_the_sliders_answer(page):
    panel = output_of(page, "generation_panel = GenerationPanel")
    type_into(panel.locator("input[type=number]").last, "400")           # the length
    # another one where the text ended too soon
    for slider in (2, 0, 1):
        panel.get_by_role("button", name="Generate", exact=True).click()
        text = panel.locator("div.gpt-text").last
        text.get_by_text("▌").wait_for(timeout=20_000)
        before, first = panel.locator(".gpt-bars").inner_text(), text.inner_text()
        handle = panel.locator(".noUi-handle").nth(slider)
        assert until(page, lambda: panel.locator(".gpt-bars").inner_text() != before,
                     lambda: press(page, handle, "ArrowRight"))
        later = text.inner_text()
        if later.endswith("▌") and len(later) > len(first):
            break
    else:
        raise AssertionError("the bars did not follow while the text was generated")
    panel.get_by_role("button", name="Stop", exact=True).click()
    tokens = panel.locator(".gpt-tokens button")
    tokens.nth(3).wait_for(timeout=20_000)
    tokens.nth(3).click()
    panel.get_by_text("◄ chosen").first.wait_for(timeout=20_000)


def test_a_head_can_be_selected(page):
    panel = output_of(page, "attention_panel = ipywidgets.interactive")
    picture = panel.locator("img").first
    picture.scroll_into_view_if_needed()
    before = picture.get_attribute("src")
    panel.locator("select").first.select_option("1")
    assert until(page, lambda: panel.locator("img").first.get_attribute("src") != before)


def test_the_menus_train_one_more_trial(page):
    panel = output_of(page, "knob_panel = ipywidgets.interactive")
    panel.locator("select").first.select_option("1")                    # n_layer
    panel.get_by_role("button", name="Train", exact=True).click()
    panel.get_by_text("n_layer=1").first.wait_for(timeout=60_000)


def test_figures_are_on_the_page(page):
    """What JupyterLab draws when the reader gets there: no error, whole pictures."""
    for source in ("attended = record_attention(", "train_and_check(twin"):
        picture = output_of(page, source).locator("img").first
        picture.scroll_into_view_if_needed()
        assert until(page, lambda: picture.evaluate(
            "image => image.complete && image.naturalWidth > 200"))
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count(
        ) == 0


def test_the_panel_works_in_notebook_7(browser, lab):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{lab}/notebooks/panel.ipynb")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=90_000)
    page.evaluate(CONNECTED_KERNEL)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    bars = page.locator(".gpt-bars")
    bars.wait_for(timeout=90_000)
    before = bars.inner_text()
    assert until(page, lambda: bars.inner_text() != before,
                 lambda: page.locator(".noUi-target").first.click(position={"x": 20, "y": 2}))
    page.close()


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The committed notebook as HTML."""
    folder = tmp_path_factory.mktemp("export")
    (folder / NOTEBOOK.name).write_text(committed(NOTEBOOK.name), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", NOTEBOOK.name,
                    "--output", "page"], check=True, cwd=folder, capture_output=True)
    return folder / "page.html"


@pytest.mark.parametrize("width", [1280, 400])
def test_the_html_export_is_whole(browser, export, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(export.as_uri(), wait_until="load", timeout=120_000)
    pictures = page.evaluate(
        "[...document.images].map(image => [image.complete, image.naturalWidth])")
    assert len(pictures) >= 15 and all(done and pixels > 0 for done, pixels in pictures)
    assert page.evaluate(
        "document.documentElement.scrollWidth") <= width, "the page is wider than the window"
    page.close()
