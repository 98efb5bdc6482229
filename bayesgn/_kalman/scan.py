"""The torch engine."""


def smooth(chain, nat1, nat2):
    raise NotImplementedError


def states(chain, nat1, nat2):
    raise NotImplementedError


def propagate(chain, noise):
    raise NotImplementedError
