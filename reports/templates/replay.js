"use strict";
// Plays recorded runs: every token has its second in data-s, and both sides of a replay share one clock.
// Without this script the page shows how the runs ended.
for (const replay of document.querySelectorAll(".replay")) {
  const toggle = replay.querySelector(".toggle");
  const sides = [...replay.querySelectorAll(".side")].map((side) => {
    const tokens = [...side.querySelectorAll("[data-s]")];
    const value = (name) => side.querySelector(`.${name}`);
    const shown = { time: value("time"), count: value("count"), rate: value("rate") };
    const last = Object.fromEntries(Object.entries(shown).map(([name, node]) => [name, node.innerHTML]));
    return { side, tokens, seconds: tokens.map((token) => Number(token.dataset.s)), shown, last };
  });
  const end = Math.max(...sides.map(({ seconds }) => seconds.at(-1)));
  let clock = end; // seconds of the recording that have been played
  let before = 0; // when the last frame was drawn, in milliseconds
  let frame = 0; // the frame that has been asked for, 0 while paused

  const speed = () => Number(replay.querySelector("input:checked").value);

  function show() {
    for (const { side, tokens, seconds, shown, last } of sides) {
      const done = clock >= seconds.at(-1);
      const count = seconds.filter((second) => second <= clock).length;
      tokens.forEach((token, i) => token.classList.toggle("there", i < count));
      side.dataset.state = done ? "done" : count ? "writing" : "reading";
      for (const name of Object.keys(shown)) if (done) shown[name].innerHTML = last[name];
      if (done) continue;
      shown.time.textContent = `${clock.toFixed(2)} s`;
      shown.count.textContent = `${count}`;
      shown.rate.textContent = count ? `${(count / clock).toFixed(1)} tokens/s` : "reading the prompt";
    }
    toggle.textContent = frame ? "Pause" : "Play";
  }

  function step(now) {
    clock = Math.min(end, clock + ((now - before) / 1000) * speed());
    before = now;
    frame = clock < end ? requestAnimationFrame(step) : 0;
    show();
  }

  function play() {
    before = performance.now();
    frame = requestAnimationFrame(step);
    show();
  }

  function pause() {
    cancelAnimationFrame(frame);
    frame = 0;
    show();
  }

  toggle.addEventListener("click", () => {
    if (frame) return pause();
    if (clock >= end) clock = 0;
    play();
  });
  replay.querySelector(".restart").addEventListener("click", () => {
    pause();
    clock = 0;
    play();
  });
  replay.querySelector(".controls").hidden = false;
}
