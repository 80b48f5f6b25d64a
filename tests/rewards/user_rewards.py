"""Reward functions as a user would write them."""

import threading

THREADS = []


def length(question, response, answer, record):
    THREADS.append(threading.current_thread().name)
    return len(response) - len(question) + len(answer) + record["level"]


def in_main_thread(question, response, answer, record):
    return 1


in_main_thread.main_thread_only = True


def broken(question, response, answer, record):
    return {}["nothing"]


def wordy(question, response, answer, record):
    return "good"


def of_two(question, response):
    return 0.0


NOT_CALLABLE = 3
