//! `GET /api/v1/status`: placeholder
