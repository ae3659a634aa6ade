"""Training samples: conversion of records to token ids and labels."""
