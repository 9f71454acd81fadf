// One clock per grid of films: it draws the same frame of every film and moves the cursors of the charts beside them.
for (const grid of document.querySelectorAll(".films")) {
  const frames = Number(grid.dataset.frames), fps = Number(grid.dataset.fps), rest = 0.7; // seconds on the last frame
  const slider = grid.querySelector("input"), play = grid.querySelector(".play"), speed = grid.querySelector(".speed");
  const cursors = [...grid.querySelectorAll(".now")];
  const films = [...grid.querySelectorAll("canvas")].map((canvas) => {
    const strip = new Image();
    strip.src = canvas.dataset.strip;
    const pen = canvas.getContext("2d"), count = Number(canvas.dataset.count);
    const small = document.createElement("canvas"); // one frame alone, so that its neighbours do not show when scaled
    strip.onload = () => { small.width = strip.width; small.height = strip.height / count; show(shown, true); };
    return { canvas, strip, pen, small, count };
  });
  let shown = 0, time = 0, before = null, rate = 0.5;
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;

  function show(frame, again) {
    if (frame === shown && !again) return;
    shown = frame;
    slider.value = frame;
    for (const { canvas, strip, pen, small, count } of films) {
      if (!strip.complete || !strip.width) continue;
      const height = small.height, index = Math.min(frame, count - 1);
      small.getContext("2d").drawImage(strip, 0, index * height, strip.width, height, 0, 0, strip.width, height);
      pen.imageSmoothingQuality = "high";
      pen.drawImage(small, 0, 0, canvas.width, canvas.height);
    }
    for (const cursor of cursors)
      cursor.setAttribute("transform", `translate(${(cursor.dataset.span * frame) / Math.max(1, frames - 1)} 0)`);
  }
  function label() {
    play.textContent = playing ? "Pause" : "Play";
    speed.textContent = { 1: "full speed", 0.5: "½ speed", 0.25: "¼ speed" }[rate];
  }
  function tick(now) {
    if (playing && before !== null) {
      time = (time + ((now - before) / 1000) * rate) % (frames / fps + rest * rate);
      show(Math.min(frames - 1, Math.floor(time * fps)));
    }
    before = now;
    requestAnimationFrame(tick);
  }
  play.onclick = () => { playing = !playing; label(); };
  speed.onclick = () => { rate = rate === 0.25 ? 1 : rate / 2; label(); };
  slider.oninput = () => { playing = false; time = (Number(slider.value) + 0.5) / fps; show(Number(slider.value)); label(); };
  label();
  requestAnimationFrame(tick);
}
