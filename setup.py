"Package metadata lives in settings.ini; this file only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
meta = ini["DEFAULT"]

setup(
    name=meta["lib_name"], version=meta["version"], description=meta["description"], author=meta["author"],
    license=meta["license"], keywords=meta["keywords"].split(), python_requires=f">={meta['min_python']}",
    long_description=(here / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    # proj.nbs is the nbs folder: the papermill notebooks and the presets travel in the wheel
    packages=find_packages(include=["proj", "proj.*"]) + ["proj.nbs"],
    package_dir={"proj": "proj", "proj.nbs": "nbs"}, package_data={"proj.nbs": ["[a-z]*.ipynb", "presets/*.yaml"]},
    install_requires=meta["requirements"].split(),
    extras_require={"dev": meta["dev_requirements"].split(), "offline": meta["offline_requirements"].split(), "qlora": meta["qlora_requirements"].split(),
                    "swipe": meta["swipe_requirements"].split()},
    entry_points={"console_scripts": meta["console_scripts"].split()}, zip_safe=False,
)
