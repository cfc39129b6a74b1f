"""The demo data set: simulated EO/SAR pairs and SAR scenes in the layout of the 2024 release."""

from data.demo.writer import DEMO_ROOT, ensure_demo, write_demo

__all__ = ["DEMO_ROOT", "ensure_demo", "write_demo"]
