// Repeats a call while somebody looks.

/**
 * Call again and again; a hidden page asks nothing, and asks at once when it is seen again.
 * @param {() => Promise<number>} step returns the seconds until the next call, Infinity for none.
 * @returns {() => void} calls now, or as soon as the call that is under way has ended.
 */
export function repeat(step) {
  let timer = null;
  let running = false;
  let wanted = false;

  const now = async () => {
    clearTimeout(timer);
    wanted = true;
    if (running) return;
    running = true;
    let seconds = 0;
    while (wanted) {
      wanted = false;
      seconds = await step();
    }
    running = false;
    if (Number.isFinite(seconds)) timer = setTimeout(tick, seconds * 1000);
  };
  const tick = () => {
    if (document.hidden) document.addEventListener("visibilitychange", tick, { once: true });
    else now();
  };
  now();
  return now;
}
