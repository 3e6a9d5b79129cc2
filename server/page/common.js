// What the page's modules share.

export const $ = (id) => document.getElementById(id);

export const milliseconds = (value) => (value == null ? "–" : `${value < 10 ? value.toFixed(2) : value.toFixed(value < 100 ? 1 : 0)} ms`);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** The bytes of the API key that was given, if one was. */
export function sentKey() {
  const key = sessionStorage.getItem("key");
  return key ? new TextEncoder().encode(key) : null;
}
