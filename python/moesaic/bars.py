"""How far long work is: tqdm's bar where it is installed, else lines on stderr."""

import importlib.util
import sys
import time


class Lines:
    def __init__(self, title, total):
        self.title, self.total, self.last, self.done, self.note = title, total, time.monotonic(), 0, ""

    def update(self, done, note=""):
        self.done, self.note = done, note
        if time.monotonic() - self.last > 10:
            self.show()

    def show(self):
        self.last = time.monotonic()
        print(f"{self.title} {self.done}/{self.total} {self.note}".rstrip(), file=sys.stderr)

    def close(self):
        self.show()


class Tqdm:
    def __init__(self, title, total, tqdm):
        self.bar = tqdm(total=total, desc=title)

    def update(self, done, note=""):
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self):
        self.bar.close()


class Silent:
    def update(self, done, note=""):
        pass

    def close(self):
        pass


def bar(title, total, show=True):
    if not show:
        return Silent()
    try:
        if importlib.util.find_spec("ipywidgets"):
            from tqdm.auto import tqdm
        else:  # tqdm.auto would warn in a notebook
            from tqdm import tqdm
    except ImportError:
        return Lines(title, total)
    return Tqdm(title, total, tqdm)


class OfTasks:
    """A bar for each task, one after the other."""

    def __init__(self, show):
        self.show, self.name, self.bar = show, None, Silent()

    def __call__(self, row):
        if row["task"] != self.name:
            self.bar.close()
            self.name, self.bar = row["task"], bar(row["task"], row["of"], self.show)
        self.bar.update(row["done"])

    def close(self):
        self.bar.close()
