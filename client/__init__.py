"""The site's side: what it allows, its data, its training. It never imports the server."""

import os

# GNU OpenMP's threads spin while they wait. Where sites share cores that turns seconds into minutes: six times the
# processor time of one round was measured with two busy processes on two cores. It has to stand before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
