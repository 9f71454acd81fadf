"""Compilation for TPUs that are not there: does a configuration fit, and how fast can it be?"""
