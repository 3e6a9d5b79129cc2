"""`trimrt report`: checkpoints and engine packages side by side, measured here, on one HTML page.

`discovery` finds them, `measuring` runs them and returns `results.Report` (which is the JSON), and
`page` renders that. Nothing on the page comes from anywhere else, so the JSON says all that it says.
"""
