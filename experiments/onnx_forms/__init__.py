"""Every form that exporters give a classifier, written from one small network and taken in."""
