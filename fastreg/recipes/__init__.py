"""The experiment behind ``fastreg train``: does an explicit penalty recover small-batch accuracy?

Small-batch SGD, large-batch SGD and large-batch SGD with a penalty, compared on held-out data
after the same number of epochs (Novack et al. 2022, arXiv 2211.15853).
"""
