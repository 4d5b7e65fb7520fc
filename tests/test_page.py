"""The page to label on: what a person answers there is what the next round reads."""

import base64
import csv
import io
import json
import re
import shutil
import time
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
import pytest
from forks import KILL, LFOSA, at_write
from PIL import Image
from test_own_images import UNTRAINED, Person, read, succeed

from datasets import sheets
from datasets.files import UserError
from datasets.page import write_page

COLUMNS = ("file", "predicted", "probability", "label")
HOSTILE = [
    '"q\'uo"te,;.png',
    "<img src=x onerror=alert(1)>/</script><script>alert(2)<!--.png",
    "100%25#a?b=c&amp;d.png",
    "line\nbreak\r\n.png",
    "\u202e\u05e9\u05dc\u05d5\u05dd\u2028.png",
    "e\N{COMBINING ACUTE ACCENT}.png",
    "long" * 48 + ".png",
    "=1+1.png",
    "C:\\back\\slash@DATA@${alert(3)}.png",
]
# In a sheet no name is a formula.
SHOWN = [f"./{file}" if file.startswith("=") else file for file in HOSTILE]


def make(folder, files, classes):
    """Write images of 6 x 4 pixels, and a sheet that asks about them, with its page."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), "teal").save(folder / file, "PNG")
    sheet = folder / "query_1.csv"
    rows = [(file, classes[i % len(classes)], 0.5, "") for i, file in enumerate(files)]
    write_page(sheet, sheets.as_cells(COLUMNS, rows), files, classes)
    sheets.write_query(sheet, COLUMNS, rows)
    return sheet


def data(page):
    """What Python has put into a page."""
    [found] = re.findall('<script id="data".*?>(.*?)</script>', page.read_text("utf-8"))
    return json.loads(found)


def filled(sheet, answers):
    """The bytes of a sheet with these answers, file -> label, in its last column."""
    text = io.StringIO(newline="")
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file)
    rows = [[*row[:-1], answers.get(row[0], "")] for row in rows]
    csv.writer(text).writerows([header, *rows])
    return text.getvalue().encode("utf-8-sig")


# ---- without a browser --------------------------------------------------------------------------


def test_names_are_data_and_links_lead_to_the_files(tmp_path):
    def tags(page):
        found, parser = [], HTMLParser()
        parser.handle_starttag = lambda tag, attributes: found.append((tag, attributes))
        parser.feed(page.read_text("utf-8"))
        return found

    plain = [f"{i}.png" for i in range(len(HOSTILE))]
    pages = []
    for name, files in (("plain", plain), ("hostile", HOSTILE)):
        pages.append(make(tmp_path / name, files, ["cat", "</script>"]).with_suffix(".html"))
    assert tags(pages[0]) == tags(pages[1])
    found = data(pages[1])
    assert [row[0] for row in found["rows"]] == SHOWN
    for file, picture in zip(HOSTILE, found["pictures"], strict=True):
        address = urlsplit(urljoin("file:///there/query_1.html", picture["link"]))
        assert (unquote(address.path), address.query, address.fragment) == (
            f"/there/{file}",
            "",
            "",
        )
    assert data(pages[0])["key"] != found["key"]


def test_a_folder_whose_path_is_no_unicode(tmp_path):
    folder = tmp_path / "caf\udce9"
    assert make(folder, ["a.png"], ["cat"]).with_suffix(".html").exists()


def test_a_page_with_its_sheet_is_never_overwritten(tmp_path):
    sheet = make(tmp_path, ["a.png"], ["cat"])
    page = sheet.with_suffix(".html").read_bytes()
    with pytest.raises(UserError, match=r"query_1\.csv"):
        make(tmp_path, ["b.png"], ["dog"])
    assert sheet.with_suffix(".html").read_bytes() == page


def test_pictures_that_browsers_do_not_show_are_copied_upright(tmp_path):
    pixels = np.random.default_rng().integers(0, 256, (8, 6, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x112] = 6  # it is to be turned by 90 degrees, clockwise
    files = ["a.tif", "b.webp", "c.ppm", "d.png", "broken.tif"]
    for file in files[:4]:
        more = {} if file == "c.ppm" else {"exif": turned if file != "d.png" else None}
        Image.fromarray(pixels).save(tmp_path / file, lossless=True, **more)
    (tmp_path / "broken.tif").write_bytes(b"no image")
    table = sheets.as_cells(COLUMNS, [(file, "cat", 0.5, "") for file in files])
    write_page(tmp_path / "query_1.csv", table, files, ["cat"])
    *copies, shown, broken = [x["source"] for x in data(tmp_path / "query_1.html")["pictures"]]
    upright = np.rot90(pixels, -1)
    for source, expected in zip(copies, (upright, upright, pixels), strict=True):
        content = io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,")))
        assert np.array_equal(np.asarray(Image.open(content)), expected)
    assert (shown, broken) == ("d.png", "")


def test_a_page_left_by_a_killed_run_becomes_that_of_the_sheet(forks, tmp_path):
    person = Person(tmp_path)
    killed = at_write("query_1.csv", 1, KILL)
    assert forks.run(tmp_path, LFOSA, *UNTRAINED, before=killed).returncode == -9
    assert not (person.folder / "query_1.csv").exists()
    with (person.folder / "labels.csv").open("a") as file:
        file.write("mixed/7/0.png,seven\n")  # another round: other classes, another pool
    succeed(forks, tmp_path, LFOSA, *UNTRAINED, "--query-batch", "5")
    found = data(person.folder / "query_1.html")
    assert [row[0] for row in found["rows"]] == person.asked(1) and "seven" in found["classes"]


# ---- in a browser -------------------------------------------------------------------------------

FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update""".split()
NO_PICKER = "delete window.showSaveFilePicker"  # as in Firefox and Safari
REFUSED = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('refused') }})"
PICKER = """window.showSaveFilePicker = async () => ({ name: "query_1.csv",
    createWritable: async () => ({ close: async () => {},
    write: async blob => window.written = [...new Uint8Array(await blob.arrayBuffer())] }) })"""


class Browser:
    """A Chromium that shows one page after another as a person sees them."""

    def __init__(self, driver, downloads):
        self.driver, self.downloads, self.run = driver, downloads, driver.execute_script
        self.scripts = []
        where = {"behavior": "allow", "downloadPath": str(downloads)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)

    def open(self, page, *before):
        """Show a page; `before` are scripts that change what it will meet."""
        for script in self.scripts:
            self.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
        add = "Page.addScriptToEvaluateOnNewDocument"
        self.scripts = [self.driver.execute_cdp_cmd(add, {"source": text}) for text in before]
        self.driver.get(page.absolute().as_uri())

    def press(self, *keys):
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def click(self, text):
        """Click on the button that begins with this text."""
        buttons = self.driver.find_elements("css selector", "header button, main button")
        next(button for button in buttons if button.text.startswith(text)).click()

    def said(self):
        return self.driver.find_element("tag name", "header").text

    def name(self):
        return self.driver.find_element("tag name", "h2").get_property("textContent")

    def picture(self):
        """Width and height of the picture in the file, as the browser turns it; None without."""
        script = "const i = document.querySelector('figure img');"
        script += "return i && i.complete && i.naturalWidth ? [i.naturalWidth, i.naturalHeight] : 0"
        return self.until(lambda: self.run(script))

    def download(self):
        """Save, and return the file that this gives."""
        self.click("Save")
        return self.until(lambda: [*self.downloads.glob("*.csv")])[0]

    @staticmethod
    def until(condition):
        for _ in range(100):
            if found := condition():
                return found
            time.sleep(0.05)
        return None


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(paths):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(paths[1])) as driver:
        yield driver


@pytest.fixture
def browser(driver, tmp_path):
    """Asserts at the end that no script failed and that no request left the page."""
    yield Browser(driver, tmp_path / "downloads")
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [x["params"] for x in events if x["method"] == "Network.requestWillBeSent"]
    sent = [x for x in sent if x["documentURL"].startswith("file:")]  # not the browser's first tab
    addresses = {request["request"]["url"] for request in sent}
    assert addresses and all(x.startswith(("file:", "data:", "blob:")) for x in addresses)
    assert driver.get_log("browser") == []


def test_a_round_answered_in_a_browser(forks, browser, tmp_path):
    person, keys = Person(tmp_path), pytest.importorskip("selenium.webdriver").Keys
    succeed(forks, tmp_path, LFOSA, *UNTRAINED, "--query-batch", "7")
    sheet = person.folder / "query_1.csv"
    asked, predicted = zip(*((row["file"], row["predicted"]) for row in read(sheet)), strict=True)
    browser.open(sheet.with_suffix(".html"), NO_PICKER)
    assert browser.name() == asked[0] and browser.picture() == [8, 8]
    browser.press("1", "u")
    browser.click("skip")
    browser.press(keys.ENTER)
    assert "4 of 7 answered" in browser.said() and browser.name() == asked[4]
    browser.driver.refresh()
    assert "4 of 7 answered" in browser.said() and browser.name() == asked[4]
    browser.press(keys.BACKSPACE)  # takes the newest answer back
    assert "3 of 7 answered" in browser.said() and browser.name() == asked[3]
    browser.click("0")
    browser.click("Unanswered")
    browser.press(keys.ARROW_RIGHT, keys.ARROW_RIGHT, keys.ARROW_RIGHT)
    assert browser.name() == asked[4]
    browser.press(keys.ARROW_LEFT, keys.ENTER)  # accepts the prediction, does not repeat the click
    assert browser.name() == asked[4]
    browser.click("Predicted")
    expected = ["1", "unknown", "skip", "0", predicted[4], "", predicted[6]]
    expected = dict(zip(asked, expected, strict=True))
    before, saved = sheet.read_bytes(), browser.download()
    assert saved.name == "query_1.csv" and sheet.read_bytes() == before
    assert saved.read_bytes() == filled(sheet, expected)
    shutil.move(saved, sheet)
    ran = succeed(forks, tmp_path, LFOSA, *UNTRAINED)
    assert "query_2.html" in ran.stdout
    [answers] = sheets.read(person.folder, person.truth).queries[:1]
    assert answers == {file: label or None for file, label in expected.items()}
    assert not {x for x, label in expected.items() if label} & {*person.asked(2)}
    browser.open(person.folder / "query_2.html")
    assert "0 of 4 answered" in browser.said()  # the answers belong to the other sheet


def test_hostile_names_in_a_browser(browser, tmp_path):
    classes = [*"abcdefghij", "Émeu", 'a,"b"', "<b>x</b>"]
    sheet = make(tmp_path, HOSTILE, classes)
    browser.open(sheet.with_suffix(".html"), PICKER)
    answers = ["emeu", '"', "<B>", "unk", "sk", "j", "Éme", "a,", "x"]
    given = ["Émeu", 'a,"b"', "<b>x</b>", "unknown", "skip", "j", "Émeu", 'a,"b"', "<b>x</b>"]
    for file, text in zip(SHOWN, answers, strict=True):
        assert browser.name() == file and browser.picture() == [6, 4]
        browser.press("/", *text, "\n")
        browser.press("\ue00c")  # Escape
    browser.click("Save")
    written = bytes(browser.until(lambda: browser.run("return window.written")))
    assert written == filled(sheet, dict(zip(SHOWN, given, strict=True)))


@pytest.mark.parametrize(("last", "end"), [(3, ""), (10, "\n"), (12, "\n")])
def test_numbers_are_answered_by_name(browser, tmp_path, last, end):
    classes = sorted(map(str, range(1, last + 1)))
    sheet = make(tmp_path, [f"{name}.png" for name in classes], classes)
    browser.open(sheet.with_suffix(".html"), NO_PICKER)
    for name in classes:
        browser.press(*name, *end)
    expected = filled(sheet, {f"{name}.png": name for name in classes})
    assert browser.download().read_bytes() == expected


def test_answers_stay_where_the_browser_keeps_none_and_the_person_is_told(browser, tmp_path):
    sheet = make(tmp_path, ["a.png", "b.png"], ["cat", "dog"])
    browser.open(sheet.with_suffix(".html"))
    usual = browser.said()
    browser.open(sheet.with_suffix(".html"), REFUSED, NO_PICKER)
    assert browser.said() != usual
    browser.press("2", "1")
    assert "2 of 2 answered" in browser.said()
    expected = filled(sheet, {"a.png": "dog", "b.png": "cat"})
    assert browser.download().read_bytes() == expected


@pytest.mark.parametrize(("width", "height"), [(320, 640), (740, 360), (1920, 1080)])
def test_it_fits_on_every_screen(browser, tmp_path, width, height):
    sheet = make(tmp_path, [f"{'long' * 40}{i}.png" for i in range(50)], [*"abcdefghijk"])
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.open(sheet.with_suffix(".html"))
    assert browser.picture()
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    box = browser.run(
        "return document.querySelector('figure img').getBoundingClientRect().toJSON()"
    )
    assert min(box["width"], box["height"]) >= 32  # eight times the file's 6 x 4 pixels
    assert box["top"] >= 0 and box["bottom"] <= height


def test_items_without_pictures_are_text(browser, tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "b.png")
    header = ["file", "text", "image", *COLUMNS[1:]]
    rows = [["1", "<b>a sentence", "", "cat", "0.5", ""], ["2", "", "b.png", "cat", "0.5", ""]]
    write_page(tmp_path / "query_1.csv", [header, *rows], ["", "b.png"], ["cat"])
    browser.open(tmp_path / "query_1.html")
    assert "<b>a sentence" in browser.driver.find_element("tag name", "figure").text
    browser.press("u")
    assert browser.name() == "2" and browser.picture() == [6, 4]
