// Clicks on what carries data-action become events for Python; a click near a point of the map means that point.
const near = 16; // pixels
function pointOfMap(event) {
  let best = null, least = near * near;
  for (const circle of event.target.closest("svg.map")?.querySelectorAll("circle") ?? []) {
    const box = circle.getBoundingClientRect();
    const x = box.x + box.width / 2 - event.clientX, y = box.y + box.height / 2 - event.clientY;
    if (x * x + y * y <= least) { best = circle; least = x * x + y * y; }
  }
  return best;
}
element.addEventListener("click", (event) => {
  const target = pointOfMap(event) ?? event.target.closest("[data-action]");
  if (!target) return;
  if (target.tagName === "circle") {
    target.parentNode.querySelector(".chosen")?.classList.remove("chosen");
    target.classList.add("chosen");
  }
  trigger("select", { action: target.dataset.action, key: target.dataset.key });
});
