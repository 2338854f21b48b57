"""A method of one's own: a class with a loss, and an entry that gives it a name.

This one pulls every prediction towards "not so sure", whatever the text says: a regulariser without
a teacher, and a fair thing to ask a distilled student to beat.
"""

from armada_lib.methods import METHODS, Entry, Method


class Smoothed(Method):
    """T(y, o_s) + gamma H(u, o_s): the task loss, and the cross-entropy to even odds u."""

    def losses(self, batch, out, phase, centroid):
        """Named, weighted terms; their sum is minimised. out.logits: (examples, classes)."""
        terms = super().losses(batch, out, phase, centroid)
        terms["smooth"] = -self.setting.gamma * out.logits.log_softmax(-1).mean()
        return terms


# Weights are part of a run's key. A constant inside the class is not: change the name with it.
METHODS["smoothed"] = Entry(
    Smoothed, "the student alone, with smoothed labels", distils=False, weights={"gamma": 0.1}
)
