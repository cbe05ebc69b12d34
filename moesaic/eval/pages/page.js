// What the scripts of all pages begin with.
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const dark = matchMedia('(prefers-color-scheme: dark)');
const el = id => document.getElementById(id);
const make = (tag, props, ...kids) => {
  const e = Object.assign(document.createElement(tag), props || {});
  e.append(...kids);
  return e;
};
const variable = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
